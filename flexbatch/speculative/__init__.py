"""Token trees: how they are drafted and how they are verified."""
