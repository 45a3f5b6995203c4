# From the sum of squares to the pair that stands for mean square + eps: mean_of() and plus() of
# statistics.hpp. m and c are what the sum's two parts are over n, exactly. The remainder of the
# quotient q is exact in its fma, so that over n it is m - q; the rounding of its sum with the low
# part is a share d of that. `lost` is what a two-sum returns, and the pair's low part, pair - v, is
# what the last addition rounds away.
@f = float<%format, ne>;
q = f(m);
ql = f((m - q + c) * (1 + d));
t = f(q + eps);
lost = q + eps - t;
l = f(lost + ql);
pair = t + l;
v = f(pair);
V = m + c + eps;
{ m in %mean /\ |c| <= %low /\ |d| <= %rounding /\ eps in %eps
  -> |pair - V| <= %bound /\ |v -/ pair| <= %high }
pair - V -> (l - (lost + ql)) + (ql - (m - q + c) * (1 + d)) + (m - q + c) * d;
