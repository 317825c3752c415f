-- of: chosen
-- A strategy that looks at the budget chooses exactly that many, or the whole pool if it is smaller;
-- one that was told where to stop may choose fewer. What a budget in costs pays for is not exceeded.
with pools as (
    select task, generation, count(*) as examples from candidates group by task, generation
),
sizes as (
    select task, selection, count(*) as examples from chosen group by task, selection
)
select
    c.task, c.generation, c.strategy, c.budget, c.seed, c.chosen,
    coalesce(s.examples, 0) as rows, coalesce(p.examples, 0) as pool
from cells as c
left join pools as p on p.task = c.task and p.generation = c.generation
left join sizes as s on s.task = c.task and s.selection = c.selection
where not c.whole
    and (
        (
            coalesce(c.budget_in, 'examples') = 'examples'
            and coalesce(s.examples, 0) > least(c.budget, coalesce(p.examples, 0))
        )
        or (
            coalesce(c.budget_in, 'examples') = 'examples'
            and coalesce(s.examples, 0) < least(c.budget, coalesce(p.examples, 0))
            and not c.stopped
        )
        or (c.budget_in = 'cost' and c.cost > c.budget * (1 + 1e-9))
        or c.chosen <> coalesce(s.examples, 0)
    )
