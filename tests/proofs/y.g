# One element, from rstd to the result. r is rstd as computed, s the element as it is normalised (x,
# or x + residual) and w is weight_offset + weight as computed; R, S and W are the exact values of
# the three. b is the bias, 0 where there is none.
#
# One binade of Y stands for all normal ones: b and w are any real numbers, and when both are scaled
# by a power of two, so is all that follows h.
@compute = float<%compute, ne>;
@result = float<%result, ne>;
h = compute(s * r);
y = result(compute(h * w + b));
P = S * R * W;
Y = P + b;
{ r -/ R in [-%rstd, %rstd] /\ s -/ S in [-%sum, %sum] /\ w -/ W in [-%weight, %weight]
  /\ %normal /\ %product /\ %binade %also
  -> |(y - Y) / %ulp| <= %bound }
