# rstd from a pair that stands for mean square + eps, rounded once. V is the exact value of that. R
# and Q are 1 / sqrt of V and of the pair, and q is what a Newton step makes of the pair before it
# is rounded.
@f = float<%format, ne>;
Q = 1 / sqrt(pair);
R = 1 / sqrt(V);
r = f(q);
{ pair -/ V in [-%pair, %pair] /\ q -/ Q in [-%newton, %newton] /\ %V
  -> |q -/ R| <= %unrounded /\ |r -/ R| <= %relative /\ |(r - R) / %ulp| <= %bound }
