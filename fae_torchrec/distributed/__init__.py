"""Floor 2: the sharding planner, the sharders and the sharded hot/cold modules."""
