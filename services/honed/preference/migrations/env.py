"""Runs the revisions inside the transaction that the caller opened; see `honed.preference.migrate`."""

from alembic import context

from honed.preference.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    # SQLite's DDL is transactional when the driver does not begin transactions on its own: a revision is applied whole.
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
