"""Plans: devices and links, cost model, partition policies, simulator. Pure: no sockets, no clocks, no torch."""
