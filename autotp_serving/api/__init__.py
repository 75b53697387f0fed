"""The HTTP room: routes, schemas, guard, metrics, chat page. Rank 0 only, never torch."""
