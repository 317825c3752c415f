-- How alike two strategies choose at the same budget and seed: examples that both chose, and their
-- share of all that either chose (Jaccard). What chance gives is in the rows with random.
with picks as (
    select task, generation, strategy, budget, seed, selection, chosen
    from cells
    where not whole
),
pairs as (
    select
        a.task,
        a.generation,
        a.budget,
        a.seed,
        a.strategy,
        b.strategy as other,
        a.selection,
        b.selection as other_selection,
        a.chosen,
        b.chosen as other_chosen
    from picks as a
    join picks as b
        on b.task = a.task and b.generation = a.generation
        and b.budget = a.budget and b.seed = a.seed and b.strategy <> a.strategy
),
meetings as (
    select p.task, p.selection, p.other_selection, count(*) as shared
    from (select distinct task, selection, other_selection from pairs) as p
    join chosen as a on a.task = p.task and a.selection = p.selection
    join chosen as b
        on b.task = p.task and b.selection = p.other_selection and b.example_id = a.example_id
    group by p.task, p.selection, p.other_selection
)
select
    p.task,
    p.generation,
    p.budget,
    p.seed,
    p.strategy,
    p.other,
    p.chosen,
    p.other_chosen,
    coalesce(m.shared, 0) as shared,
    coalesce(m.shared, 0) / nullif(p.chosen + p.other_chosen - coalesce(m.shared, 0), 0) as jaccard
from pairs as p
left join meetings as m
    on m.task = p.task and m.selection = p.selection and m.other_selection = p.other_selection
order by p.task, p.generation, p.budget, p.seed, p.strategy, p.other
