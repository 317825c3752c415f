-- of: budget_curve
-- One row per task, generation, strategy, budget and metric.
select task, generation, strategy, budget, metric, count(*) as rows
from budget_curve
group by task, generation, strategy, budget, metric
having count(*) > 1
