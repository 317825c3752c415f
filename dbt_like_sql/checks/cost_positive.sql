-- of: cost
-- Seconds are never negative, and training on the whole pool is there to compare with.
select task, generation, strategy, budget, select_seconds, train_seconds, ratio_to_full
from cost
where select_seconds < 0 or train_seconds < 0 or ratio_to_full is null
