-- of: coverage
-- Shares of classes, and of sources, sum to 1 among the chosen and in the pool.
select
    task, generation, strategy, budget, dimension,
    sum(share) as share, sum(pool_share) as pool_share
from coverage
group by task, generation, strategy, budget, dimension
having abs(sum(share) - 1) > 1e-9 or abs(sum(pool_share) - 1) > 1e-9
