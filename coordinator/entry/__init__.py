"""Who may come in, as what, and what they are told at the door."""
