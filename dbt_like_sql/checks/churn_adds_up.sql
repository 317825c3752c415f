-- of: churn
-- What was kept and what came is what is chosen now.
select h.task, h.generation, h.strategy, h.budget, h.seed, h.kept, h.added, h.dropped, c.chosen
from churn as h
left join cells as c
    on c.task = h.task and c.generation = h.generation and c.strategy = h.strategy
    and c.budget = h.budget and c.seed = h.seed
where c.chosen is null or h.kept + h.added <> c.chosen or least(h.kept, h.added, h.dropped) < 0
