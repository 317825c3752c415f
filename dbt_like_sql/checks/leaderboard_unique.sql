-- of: leaderboard
-- One row per task, generation, strategy, budget and metric.
select task, generation, strategy, budget, metric, count(*) as rows
from leaderboard
group by task, generation, strategy, budget, metric
having count(*) > 1
