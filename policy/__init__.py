"""Where things live: measured hardware, the cost of a policy, and the search for the best one. Plain numbers in,
plain numbers out."""
