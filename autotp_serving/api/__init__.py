"""HTTP: app, middleware, schemas, native routes, metrics, chat page. Rank 0 only, never torch."""
