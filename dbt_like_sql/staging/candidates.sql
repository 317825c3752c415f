-- The pool as each compared generation saw it: one row per example that could be chosen.
-- Rows without a usable gradient are out; of an example that arrived more than once, the first
-- arrival's row stands.
select p.task, g.generation, p.arrival, p.row, p.example_id, p.label, p.label_name, p.source
from pool as p
join generations as g on g.task = p.task and g.pool = p.artifact
semi join gradients as r
    on r.task = p.task and r.artifact = g.gradients and r.example_id = p.example_id
where (g.task, g.generation) in (select task, generation from cells)
qualify row_number() over (
    partition by p.task, g.generation, p.example_id order by g.position, p.row
) = 1
order by p.task, g.generation, p.arrival, p.row
