"""What chooses a policy.  Knows blocks, choices, budgets and two functions; knows nothing of networks or files."""
