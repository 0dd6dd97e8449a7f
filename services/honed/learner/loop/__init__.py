"""The order of the promises: collect, update, make durable, acknowledge, publish; and where a run is written down."""
