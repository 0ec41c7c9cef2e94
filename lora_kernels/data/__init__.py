"""Data for the trainers: records from files, conversations and pairs, chat templates, tokens."""
