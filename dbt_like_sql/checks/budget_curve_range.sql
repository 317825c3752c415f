-- of: budget_curve
-- Accuracy and macro-F1 lie in [0, 1], and the mean between the smallest and the largest.
select task, generation, strategy, budget, metric, min, mean, max
from budget_curve
where not coalesce(min >= 0 and max <= 1 and mean between min - 1e-9 and max + 1e-9, false)
