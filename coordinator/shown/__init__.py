"""What people and programs see of the pool and its jobs, and how live news reach them."""
