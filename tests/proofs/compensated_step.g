# One addition to a lane of doubles. hi becomes f(a), where a is hi and the next square; what that
# rounds away is added to lo. T is the exact sum of the whole lane, of which a and lo are shares k
# and g. A lane of a row of 2^20 has 2^17 steps: each error is at most 2^-53 of T, lo therefore at
# most 2^-36, and what lo itself loses 2^-88 a step.
@f = float<53, -1074, ne>;
a = T * k;
error = a - f(a);
lo = T * g;
next = f(lo + error);
{ T in %total /\ k in %sum /\ |g| <= %low
  -> |error / T| <= %error /\ |(next - (lo + error)) / T| <= %lost }
error / T -> -((f(a) - a) / a) * k { T <> 0, k <> 0 };
