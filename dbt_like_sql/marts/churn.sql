-- What each generation changed: of the examples that a strategy chose in the last generation before
-- that has it, at the same budget and seed, how many it kept, how many came and how many went. Where the
-- strategy has an objective (`aim`), what it is for the old choice, which `objective_before` judges in
-- the new pool, and for the new one.
with consecutive as (
    select
        task,
        generation,
        strategy,
        budget,
        seed,
        selection,
        chosen,
        aim,
        objective_before,
        objective,
        lag(generation) over earlier as since,
        lag(selection) over earlier as earlier_selection,
        lag(chosen) over earlier as earlier_chosen
    from cells
    window earlier as (partition by task, strategy, budget, seed order by generation)
),
stayed as (
    select c.task, c.selection, c.earlier_selection, count(*) as kept
    from (select distinct task, selection, earlier_selection from consecutive) as c
    join chosen as a on a.task = c.task and a.selection = c.selection
    join chosen as b
        on b.task = c.task and b.selection = c.earlier_selection and b.example_id = a.example_id
    group by c.task, c.selection, c.earlier_selection
)
select
    c.task,
    c.generation,
    c.since,
    c.strategy,
    c.budget,
    c.seed,
    coalesce(s.kept, 0) as kept,
    c.chosen - coalesce(s.kept, 0) as added,
    c.earlier_chosen - coalesce(s.kept, 0) as dropped,
    c.aim,
    c.objective_before,
    c.objective as objective_after
from consecutive as c
left join stayed as s
    on s.task = c.task and s.selection = c.selection
    and s.earlier_selection = c.earlier_selection
where c.since is not null
order by c.task, c.generation, c.strategy, c.budget, c.seed
