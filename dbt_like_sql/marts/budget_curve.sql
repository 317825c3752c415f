-- How the test score grows with the budget: mean, spread and range over the seeds.
-- Read along a strategy's budgets, and across to the row of full, which is the same at every budget.
with scores as (
    select task, generation, strategy, budget, seed, 'accuracy' as metric, test_accuracy as score
    from cells
    union all
    select task, generation, strategy, budget, seed, 'macro_f1' as metric, test_macro_f1 as score
    from cells
)
select
    task,
    generation,
    strategy,
    budget,
    metric,
    count(*) as seeds,
    avg(score) as mean,
    stddev_samp(score) as sd,
    min(score) as min,
    max(score) as max
from scores
group by task, generation, strategy, budget, metric
order by task, generation, metric, strategy, budget
