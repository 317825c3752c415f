-- Every chosen example with its label and where it came from: one row per selection and example.
-- Cells that share a selection share its rows: join `cells` on task and selection for budget and seed.
with selections as (
    select distinct task, generation, strategy, selection from cells
)
select
    s.task,
    s.generation,
    s.strategy,
    s.selection,
    e.example_id,
    c.arrival,
    c.row,
    c.source,
    c.label,
    c.label_name,
    e.rank,
    e.weight
from selections as s
join selected as e on e.task = s.task and e.selection = s.selection
left join candidates as c
    on c.task = s.task and c.generation = s.generation and c.example_id = e.example_id
order by s.task, s.generation, s.strategy, s.selection, e.rank
