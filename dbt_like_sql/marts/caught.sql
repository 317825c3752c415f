-- How much of what each strategy chose is flawed (wrong label, near duplicate, off task) beside the
-- same share in the pool, mean over seeds; only examples whose truth is known count. `repeated` is
-- the share of chosen near duplicates whose original was chosen as well.
with known as (
    select
        c.task,
        c.generation,
        c.example_id,
        cast(t.flipped as double) as flipped,
        cast(t.duplicate_of is not null as double) as near_duplicate,
        cast(t.off_task as double) as off_task,
        o.example_id as original
    from candidates as c
    join truth as t on t.task = c.task and t.arrival = c.arrival and t.row = c.row
    left join candidates as o
        on o.task = c.task and o.generation = c.generation
        and o.arrival = c.arrival and o.row = t.duplicate_of
),
pool_shares as (
    select
        task,
        generation,
        avg(flipped) as flipped,
        avg(near_duplicate) as near_duplicate,
        avg(off_task) as off_task
    from known
    group by task, generation
),
selection_shares as (
    select
        h.task,
        h.selection,
        count(*) as known,
        avg(k.flipped) as flipped,
        avg(k.near_duplicate) as near_duplicate,
        avg(cast(o.example_id is not null as double)) as repeated,
        avg(k.off_task) as off_task
    from chosen as h
    join known as k
        on k.task = h.task and k.generation = h.generation and k.example_id = h.example_id
    left join chosen as o
        on o.task = h.task and o.selection = h.selection and o.example_id = k.original
    group by h.task, h.selection
)
select
    c.task,
    c.generation,
    c.strategy,
    c.budget,
    avg(s.known) as known,
    avg(s.flipped) as flipped,
    p.flipped as pool_flipped,
    avg(s.near_duplicate) as near_duplicate,
    p.near_duplicate as pool_near_duplicate,
    avg(s.repeated) as repeated,
    avg(s.off_task) as off_task,
    p.off_task as pool_off_task
from cells as c
join selection_shares as s on s.task = c.task and s.selection = c.selection
join pool_shares as p on p.task = c.task and p.generation = c.generation
group by
    c.task, c.generation, c.strategy, c.budget, p.flipped, p.near_duplicate, p.off_task
order by c.task, c.generation, c.budget, c.strategy
