-- Seconds of selecting beside seconds of training, mean over seeds, and both together as a ratio to
-- training on the whole pool. `sketch_seconds` is the one pass over the pool that strategies on
-- sketches share; `ratio_with_sketches` counts it in full, as if the strategy were the only one.
with means as (
    select
        task,
        generation,
        strategy,
        budget,
        avg(chosen) as chosen,
        avg(select_seconds) as select_seconds,
        max(sketch_seconds) as sketch_seconds,
        avg(train_seconds) as train_seconds
    from cells
    group by task, generation, strategy, budget
)
select
    m.task,
    m.generation,
    m.strategy,
    m.budget,
    m.chosen,
    m.select_seconds,
    m.sketch_seconds,
    m.train_seconds,
    (m.select_seconds + m.train_seconds) / nullif(f.train_seconds, 0) as ratio_to_full,
    (m.sketch_seconds + m.select_seconds + m.train_seconds)
        / nullif(f.train_seconds, 0) as ratio_with_sketches
from means as m
left join means as f
    on f.task = m.task and f.generation = m.generation
    and f.budget = m.budget and f.strategy = 'full'
order by m.task, m.generation, m.budget, m.strategy
