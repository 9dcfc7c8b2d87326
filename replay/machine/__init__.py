"""The computer: memory, reading ahead, switches of torch. Imports nothing of the replay."""
