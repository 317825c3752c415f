-- What each strategy scored on the test split, its difference from random and the verdict.
-- `validation_verdict` is the one that promotion reads; random itself is the baseline. Holm's
-- correction spans the strategies at the promoted budget; verdicts at other budgets are descriptive.
with means as (
    select
        task,
        generation,
        strategy,
        budget,
        count(distinct seed) as seeds,
        avg(test_accuracy) as mean,
        avg(select_seconds) as select_seconds,
        avg(train_seconds) as train_seconds
    from cells
    group by task, generation, strategy, budget
),
test as (
    select * from comparisons where split = 'test' and metric = 'accuracy'
),
validation as (
    select * from comparisons where split = 'validation' and metric = 'accuracy'
)
select
    m.task,
    m.generation,
    m.strategy,
    m.budget,
    m.seeds,
    'accuracy' as metric,
    m.mean,
    t.diff,
    t.diff_low,
    t.diff_high,
    if(m.strategy = 'random', 'baseline', t.verdict) as verdict,
    if(m.strategy = 'random', 'baseline', v.verdict) as validation_verdict,
    m.select_seconds,
    m.train_seconds
from means as m
left join test as t
    on t.task = m.task and t.generation = m.generation
    and t.strategy = m.strategy and t.budget = m.budget
left join validation as v
    on v.task = m.task and v.generation = m.generation
    and v.strategy = m.strategy and v.budget = m.budget
order by m.task, m.generation, m.budget, m.mean desc, m.strategy
