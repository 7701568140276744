"""The method inside other people's trainers: docs/other_trainers.md."""
