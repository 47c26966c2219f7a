"""The tables of the snapshotter's database, as steps from an empty one."""

#: The schema's steps; a database at version N has had the first N applied.
MIGRATIONS = (
    """
    CREATE TABLE closures (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        identity TEXT NOT NULL UNIQUE,
        reference TEXT NOT NULL,
        paths TEXT NOT NULL,
        store_mtime INTEGER NOT NULL DEFAULT 0
    ) STRICT;
    CREATE TABLE snapshots (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        key TEXT NOT NULL UNIQUE,
        kind INTEGER NOT NULL,
        parent INTEGER REFERENCES snapshots (id),
        created INTEGER NOT NULL,
        updated INTEGER NOT NULL,
        labels TEXT NOT NULL,
        closure INTEGER REFERENCES closures (id),
        strategy TEXT NOT NULL DEFAULT '',
        size INTEGER NOT NULL DEFAULT 0,
        inodes INTEGER NOT NULL DEFAULT 0
    ) STRICT;
    CREATE INDEX snapshots_parent ON snapshots (parent);
    CREATE INDEX snapshots_closure ON snapshots (closure);
    """,
    # When all paths of a closure were last seen is known in memory only.
    "ALTER TABLE closures DROP COLUMN store_mtime;",
    # Of closures from before nobody knows which of their paths keep the others.
    "ALTER TABLE closures ADD COLUMN roots TEXT NOT NULL DEFAULT '';",
)
