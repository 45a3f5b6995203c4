# rstd of float rows on the CPU, in double and rounded once. S is the computed sum, M the exact one.
#
# One binade of R stands for all: everything here scales with powers of four of x and eps.
@f64 = float<53, -1074, ne>;
@f32 = float<24, -149, ne>;
v = f64(f64(S / n) + eps);
q = f64(1 / f64(sqrt(v)));
r = f32(q);
V = M / n + eps;
R = 1 / sqrt(V);
{ S -/ M in [-%sum, %sum] /\ M / n in %mean /\ eps in %eps /\ %V
  -> |q -/ R| <= %unrounded /\ |r -/ R| <= %relative /\ |(r - R) / 1b-24| <= %bound }
