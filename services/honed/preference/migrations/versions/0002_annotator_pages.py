"""An annotator's judgements in the order of their ids: an erasure goes through them in pages."""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Applies the revision."""
    op.create_index(op.f("ix_judgements_annotator_id"), "judgements", ["annotator", "id"])
    op.drop_index(op.f("ix_judgements_annotator"), "judgements")


def downgrade() -> None:
    """Takes it back."""
    op.create_index(op.f("ix_judgements_annotator"), "judgements", ["annotator"])
    op.drop_index(op.f("ix_judgements_annotator_id"), "judgements")
