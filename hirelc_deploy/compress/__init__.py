"""Networks made smaller: channels gone, number formats applied, weights tuned again."""
