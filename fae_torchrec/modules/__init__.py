"""Floor 1: the unsharded hot/cold EmbeddingBagCollection and its conversion from and to stock."""
