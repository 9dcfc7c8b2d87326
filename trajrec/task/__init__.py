"""What the user says was trained: model, data, loss. Imports nothing of capture/, runfile/, replay or cli."""
