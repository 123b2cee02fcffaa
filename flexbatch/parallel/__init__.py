"""Several processes that run one model: who is who, how they talk, and how they are started."""
