-- of: chosen
-- A selection holds an example once.
select task, generation, selection, example_id, count(*) as rows
from chosen
group by task, generation, selection, example_id
having count(*) > 1
