"""The record: judgements with their labels and counts, snapshots, erasures."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# Written out, not imported from the models: a revision says for ever what it said when it was released.
_BIG_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Applies the revision."""
    op.create_table(
        "judgements",
        sa.Column("id", _BIG_ID, autoincrement=False, nullable=False),
        sa.Column("idempotency_key", sa.String(128), nullable=False),
        sa.Column("kind", sa.SmallInteger(), nullable=False),
        sa.Column("source", sa.String(128), nullable=False),
        sa.Column("annotator", sa.String(128), nullable=False),
        sa.Column("judged_at", sa.BigInteger(), nullable=False),
        sa.Column("stored_at", sa.BigInteger(), nullable=False),
        sa.Column("content_sha256", sa.LargeBinary(32), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_judgements")),
        sa.UniqueConstraint("idempotency_key", name=op.f("uq_judgements_idempotency_key")),
    )
    op.create_index(op.f("ix_judgements_annotator"), "judgements", ["annotator"])
    op.create_index(op.f("ix_judgements_source_kind_id"), "judgements", ["source", "kind", "id"])
    op.create_table(
        "judgement_labels",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("value", sa.String(256), nullable=False),
        sa.Column("judgement_id", _BIG_ID, nullable=False),
        sa.ForeignKeyConstraint(
            ["judgement_id"],
            ["judgements.id"],
            name=op.f("fk_judgement_labels_judgement_id_judgements"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("name", "value", "judgement_id", name=op.f("pk_judgement_labels")),
        sqlite_with_rowid=False,
    )
    state = op.create_table(
        "record_state",
        sa.Column("singleton", sa.SmallInteger(), autoincrement=False, nullable=False),
        sa.Column("last_id", sa.BigInteger(), nullable=False),
        sa.Column("annotators", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("singleton = 1", name=op.f("ck_record_state_one_row")),
        sa.PrimaryKeyConstraint("singleton", name=op.f("pk_record_state")),
    )
    op.bulk_insert(state, [{"singleton": 1, "last_id": 0, "annotators": 0}])
    op.create_table(
        "judgement_counts",
        sa.Column("kind", sa.SmallInteger(), autoincrement=False, nullable=False),
        sa.Column("source", sa.String(128), nullable=False),
        sa.Column("judgements", sa.BigInteger(), nullable=False),
        sa.Column("last_id", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("kind", "source", name=op.f("pk_judgement_counts")),
    )
    op.create_table(
        "annotator_counts",
        sa.Column("annotator", sa.String(128), nullable=False),
        sa.Column("kind", sa.SmallInteger(), autoincrement=False, nullable=False),
        sa.Column("source", sa.String(128), nullable=False),
        sa.Column("judgements", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("annotator", "kind", "source", name=op.f("pk_annotator_counts")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "snapshots",
        sa.Column("snapshot_id", sa.String(128), nullable=False),
        sa.Column("idempotency_key", sa.String(128), nullable=False),
        sa.Column("filter", sa.LargeBinary(), nullable=False),
        sa.Column("up_to_id", sa.BigInteger(), nullable=False),
        sa.Column("content_sha256", sa.String(64), nullable=False),
        sa.Column("judgements", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("snapshot_id", name=op.f("pk_snapshots")),
        sa.UniqueConstraint("idempotency_key", name=op.f("uq_snapshots_idempotency_key")),
    )
    op.create_table(
        "erasures",
        sa.Column("idempotency_key", sa.String(128), nullable=False),
        sa.Column("judgements", sa.BigInteger(), nullable=False),
        sa.Column("erased_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("idempotency_key", name=op.f("pk_erasures")),
    )


def downgrade() -> None:
    """Refuses: the revision before has no place for judgements."""
    raise NotImplementedError("the first revision cannot be undone without losing every judgement; drop the database")
