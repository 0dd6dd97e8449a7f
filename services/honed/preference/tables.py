"""The tables of the record, the same on SQLite and PostgreSQL.

A judgement is stored as its content (deterministic protobuf bytes, so that it comes back exactly: floats by their bits, field
presence, any field that a newer client knows) beside the columns to select by. Two things live in columns alone: `id`, which
the store assigns, and `annotator`, so that erasing a pseudonym is one update and leaves no copy inside the content.

Content never changes after its insert. So a snapshot is a filter with an upper id, and needs no list of its members.
"""

from __future__ import annotations

import sqlalchemy as sa

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}

metadata = sa.MetaData(naming_convention=NAMING)

BigId = sa.BigInteger().with_variant(sa.Integer, "sqlite")
"""64 bits on both databases; SQLite makes only an INTEGER primary key its row id."""

judgements = sa.Table(
    "judgements",
    metadata,
    # Assigned from `record_state.last_id` under its lock, so ids rise in the order of commits, without gaps.
    sa.Column("id", BigId, primary_key=True, autoincrement=False),
    sa.Column("idempotency_key", sa.String(128), nullable=False),
    # A number of the contract's JudgementKind.
    sa.Column("kind", sa.SmallInteger, nullable=False),
    sa.Column("source", sa.String(128), nullable=False),
    sa.Column("annotator", sa.String(128), nullable=False),
    # Microseconds since 1970, UTC. When the judgement has no time of its own, `judged_at` equals `stored_at`.
    sa.Column("judged_at", sa.BigInteger, nullable=False),
    sa.Column("stored_at", sa.BigInteger, nullable=False),
    # sha256 of what snapshots hash: see `honed.preference.content`.
    sa.Column("content_sha256", sa.LargeBinary(32), nullable=False),
    # The judgement without id and annotator, as deterministic protobuf bytes.
    sa.Column("content", sa.LargeBinary, nullable=False),
    sa.UniqueConstraint("idempotency_key"),
    sa.Index(None, "source", "kind", "id"),
    # An erasure goes through one annotator's judgements page by page.
    sa.Index(None, "annotator", "id"),
)

judgement_labels = sa.Table(
    "judgement_labels",
    metadata,
    # The order of the key is the order of the question: which judgements have this value of this label.
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("value", sa.String(256), primary_key=True),
    sa.Column("judgement_id", BigId, sa.ForeignKey("judgements.id", ondelete="CASCADE"), primary_key=True),
    sqlite_with_rowid=False,
)

record_state = sa.Table(
    "record_state",
    metadata,
    # One row. Its lock orders all writers; see `honed.preference.writing`.
    sa.Column("singleton", sa.SmallInteger, primary_key=True, autoincrement=False),
    sa.Column("last_id", sa.BigInteger, nullable=False),
    # Different annotators with at least one judgement, erased ones not counted.
    sa.Column("annotators", sa.BigInteger, nullable=False),
    sa.CheckConstraint("singleton = 1", name="one_row"),
)

judgement_counts = sa.Table(
    "judgement_counts",
    metadata,
    sa.Column("kind", sa.SmallInteger, primary_key=True, autoincrement=False),
    sa.Column("source", sa.String(128), primary_key=True),
    sa.Column("judgements", sa.BigInteger, nullable=False),
    sa.Column("last_id", sa.BigInteger, nullable=False),
)

annotator_counts = sa.Table(
    "annotator_counts",
    metadata,
    sa.Column("annotator", sa.String(128), primary_key=True),
    sa.Column("kind", sa.SmallInteger, primary_key=True, autoincrement=False),
    sa.Column("source", sa.String(128), primary_key=True),
    sa.Column("judgements", sa.BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

snapshots = sa.Table(
    "snapshots",
    metadata,
    sa.Column("snapshot_id", sa.String(128), primary_key=True),
    sa.Column("idempotency_key", sa.String(128), nullable=False),
    # The filter as deterministic protobuf bytes, and the largest id that may belong.
    sa.Column("filter", sa.LargeBinary, nullable=False),
    sa.Column("up_to_id", sa.BigInteger, nullable=False),
    sa.Column("content_sha256", sa.String(64), nullable=False),
    sa.Column("judgements", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.UniqueConstraint("idempotency_key"),
)

erasures = sa.Table(
    "erasures",
    metadata,
    # The answer to a repeated call. It does not say whom it was about, nor any digest of that: a digest can be guessed back.
    sa.Column("idempotency_key", sa.String(128), primary_key=True),
    sa.Column("judgements", sa.BigInteger, nullable=False),
    sa.Column("erased_at", sa.BigInteger, nullable=False),
)
