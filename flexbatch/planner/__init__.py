"""From settings, model, machine and job to a frozen engine plan, and a run held beside its plan."""
