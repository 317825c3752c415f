-- of: chosen
-- Nothing is chosen from outside the generation's pool.
select c.task, c.generation, c.strategy, c.selection, c.example_id
from chosen as c
anti join candidates as p
    on p.task = c.task and p.generation = c.generation and p.example_id = c.example_id
