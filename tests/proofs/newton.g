# What the Newton step makes of the guess r0 = R (1 + d), before its last operation is rounded. The
# pair V = v + vl is 1 / R^2 exactly. Doubles compute the residual 1 - V r0^2 by three fma, CUDA's
# floats V r0^2 - 1, the same numbers with the other sign. `rest`, what the square rounds away, is
# exact in its fma unless it is denormal.
#
# The rules expand q - R in powers of d, of which the first cancels: that is what the step is for.
@f = float<%format, ne>;
V = 1 / (R * R);
vl = V * l;
v = V - vl;
r0 = R * (1 + d);
square = f(r0 * r0);
rest = r0 * r0 - square;
e1 = f(v * square - 1);
e2 = f(e1 + v * rest);
e3 = f(e2 + vl * square);
q = r0 - r0 * e3 / 2;
{ R in %R /\ |d| <= %guess /\ |l| <= %high -> |q -/ R| <= %bound }
e3 - (2 * d + d * d) ->
  (e3 - (e2 + vl * square)) + (e2 - (e1 + v * rest)) + (e1 - (v * square - 1)) - vl * rest
  { R <> 0 };
q - R ->
  R * ((-(1 + d) * (e3 - (2 * d + d * d)) - 3 * d * d - d * d * d) / 2)
  { R <> 0 };
$ R in 16;
