# One addition to a sum of squares. t is the exact sum so far and s the computed one, within a share
# of %sum of it; p is the next square, exact inside its fma. What the addition rounds away is little
# more than one unit of the exact sum t + p, and t + p is at most the whole sum. So k additions err
# by k of these units in all, as long as that many stay below %sum.
@f = float<%format, ne>;
S = s + p;
T = t + p;
{ (s - t) / t in [-%sum, %sum] /\ p / t in %next /\ t in %total
  -> (f(S) - S) / T in [-%bound, %bound] }
S -> T * (1 + ((s - t) / t) * (1 / (1 + p / t))) { t <> 0, T <> 0 };
