"""Trainers of the tokenizer, the world model and heads: one loop; ``workers.launch`` says where it runs."""
