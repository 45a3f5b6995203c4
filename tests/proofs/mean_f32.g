# The same in pairs of floats, on CUDA: mean_of() and plus() of sums.cuh. x is the exact product of
# the high parts of the sum and of the reciprocal count. The low parts are shares of these: a of the
# sum, b of the reciprocal count, g of eps. The pairs of the latter two are off by shares c and k.
# The fma that gives `remainder` and the two-sum that gives `lost` are exact.
@f = float<24, -149, ne>;
mean = f(x);
remainder = x - mean;
low = f(x * b + remainder);
mean_low = f(x * a + low);
t = f(mean + eps);
lost = mean + eps - t;
m = f(mean_low + eps * g);
l = f(lost + m);
pair = t + l;
v = f(pair);
V = x * (1 + a) * (1 + b) * (1 + c) + eps * (1 + g) * (1 + k);
{ |a| <= %a /\ |b| <= %b /\ |g| <= %g /\ |c| <= %c /\ |k| <= %k /\ x in %mean /\ eps in %eps
  -> |pair - V| <= %bound /\ |v -/ pair| <= %high }
pair - V ->
  (l - (lost + m)) + (m - (mean_low + eps * g)) + (mean_low - (x * a + low))
  + (low - (x * b + remainder)) - x * a * b - x * (1 + a) * (1 + b) * c - eps * (1 + g) * k;
