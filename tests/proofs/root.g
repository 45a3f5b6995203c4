# The first guess of 1 / sqrt(V), from the high part v of the pair that V is.
@f = float<%format, ne>;
guess = %guess;
R = 1 / sqrt(V);
{ v -/ V in [-%high, %high] /\ V in %V -> guess -/ R in [-%bound, %bound] }
