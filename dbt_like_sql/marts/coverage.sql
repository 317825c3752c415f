-- Which classes and sources each strategy draws on: the share of each among the chosen, mean over
-- seeds, beside its share in the pool. A share above the pool's means that the strategy favours it.
with pool_values as (
    select task, generation, 'class' as dimension, label_name as value from candidates
    union all
    select task, generation, 'source' as dimension, source as value from candidates
),
pool_counts as (
    select task, generation, dimension, value, count(*) as examples
    from pool_values
    group by task, generation, dimension, value
),
pool_shares as (
    select
        task,
        generation,
        dimension,
        value,
        examples / sum(examples) over (partition by task, generation, dimension) as share
    from pool_counts
),
chosen_values as (
    select task, selection, 'class' as dimension, label_name as value from chosen
    union all
    select task, selection, 'source' as dimension, source as value from chosen
),
chosen_counts as (
    select task, selection, dimension, value, count(*) as examples
    from chosen_values
    group by task, selection, dimension, value
)
select
    c.task,
    c.generation,
    c.strategy,
    c.budget,
    p.dimension,
    p.value,
    avg(coalesce(n.examples, 0) / c.chosen) as share,
    p.share as pool_share
from cells as c
join pool_shares as p on p.task = c.task and p.generation = c.generation
left join chosen_counts as n
    on n.task = c.task and n.selection = c.selection
    and n.dimension = p.dimension and n.value = p.value
where c.chosen > 0
group by c.task, c.generation, c.strategy, c.budget, p.dimension, p.value, p.share
order by c.task, c.generation, c.budget, c.strategy, p.dimension, p.value
