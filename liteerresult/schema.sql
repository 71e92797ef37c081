-- liteerresult, file format 1.
--
-- One file holds the results of work on one host. This page is the whole format: with it and the
-- sqlite3 shell you can read and write everything that the Python package can.
--
--   Look:      SELECT * FROM task_overview;     SELECT * FROM group_overview;
--   Create:    INSERT INTO tasks (id, name) VALUES ('frame-7', 'render');
--   Finish:    UPDATE tasks SET status = 'DONE', result = '{"rows": 3}' WHERE id = 'frame-7';
--   Fail:      UPDATE tasks SET status = 'FAILURE', result = '"disk full"' WHERE id = 'frame-7';
--   Again:     UPDATE tasks SET status = 'PENDING', retries = retries + 1 WHERE id = 'frame-7';
--   Group:     INSERT INTO groups (id) VALUES ('film');
--              INSERT INTO group_members (group_id, position, task_id) VALUES ('film', 0, 'frame-7');
--   Wake:      nothing to do: a waiter looks every 250 ms. To wake it at once, write one byte to the
--              start of the file `<database>-bell` after the commit.
--
-- What a writer leaves out is filled in (times, completion number, encoding), every group counts along,
-- and an illegal change is refused with its reason: the triggers below do that for every program.
-- Times are Unix seconds (UTC). Ids are any non-empty text. SQLite 3.38 or newer.
--
-- Beside the file: -wal and -shm are SQLite's own; -bell wakes everybody who waits, and the files of -bells/
-- those who wait for certain tasks; -lock queues the writers; -owners/ holds one locked file for each
-- process that runs tasks. Copy a store with `.backup`,
-- never by hand while it is in use.

PRAGMA page_size = 2048;    -- a commit rewrites whole pages: small ones are cheaper here
PRAGMA journal_mode = WAL;  -- readers never wait for a writer


-- Tasks ---------------------------------------------------------------------------------------------

CREATE TABLE tasks (
    -- Order of creation.
    number      INTEGER PRIMARY KEY,

    id          TEXT NOT NULL UNIQUE
                CONSTRAINT "a task id is not empty" CHECK (id <> ''),

    -- What kind of work, for people: 'render'. May be NULL.
    name        TEXT,

    --   PENDING   known, waits for execution
    --   STARTED   a live owner runs it
    --   RETRY     an attempt failed, there will be another; result is its exception
    --   LOST      its worker died; the process that submitted it decides what now
    --   PROGRESS  or any other upper-case name: a custom state; result is its meta
    --   DONE      final; result is the return value
    --   FAILURE   final; result is the exception
    --   REVOKED   final; cancelled
    status      TEXT NOT NULL DEFAULT 'PENDING'
                CONSTRAINT "a status is an upper-case name (success is called DONE)"
                CHECK (status = 'DONE' OR status = 'STARTED' OR status = 'PENDING' OR status = 'FAILURE'
                       OR status GLOB '[A-Z]*' AND status NOT GLOB '*[^A-Z0-9_]*' AND status <> 'SUCCESS'),

    -- Return value, exception or meta, as the status says. NULL is None. Written ahead, while the task is
    -- PENDING or STARTED, it is the value once the task is DONE; a custom state's meta is not.
    result      ANY,

    -- How result is written: 'json' (text) or 'pickle' (blob). NULL is read as 'json'.
    encoding    TEXT,

    -- Formatted traceback of the process that failed, for people.
    traceback   TEXT,

    -- The task or group that submitted this one.
    parent_id   TEXT,

    -- The call, in the same JSON as results: an array and an object.
    args        ANY,
    kwargs      ANY,

    -- Identifies the call, so that a resumed batch can refuse changed inputs.
    fingerprint TEXT,

    -- Attempts before this one. A worker that holds an older number can't write any more.
    retries     INTEGER NOT NULL DEFAULT 0 CHECK (retries >= 0),

    -- The process that answers for this task (owners.id): its submitter while it waits, its worker
    -- once it runs. If that process dies first, the task is FAILURE with WorkerLostError.
    -- NULL: nobody in particular.
    owner       TEXT,

    -- The process (owners.id) that manages the batch this task is in. If another one runs the task and
    -- dies, the task is LOST and owned by its submitter again, which tries anew or calls it FAILURE.
    submitter   TEXT,

    created_at  REAL NOT NULL DEFAULT ((julianday('now') - 2440587.5) * 86400.0),
    started_at  REAL,
    done_at     REAL,

    -- Kept by the triggers: the group (groups.number) that counts this task, if it is one and the task
    -- stands in it once. 0: look in group_tasks. NULL: in no group.
    group_number INTEGER,

    -- Completion number: 1, 2, 3 … in the order in which tasks of this file became final, never used
    -- again. NULL while the task is not final.
    done_number INTEGER
) STRICT;

-- Not UNIQUE, or an OR REPLACE could delete a final row for its number; the triggers see that none is used twice.
CREATE INDEX tasks_by_completion ON tasks (done_number) WHERE done_number IS NOT NULL;
CREATE INDEX tasks_by_parent ON tasks (parent_id) WHERE parent_id IS NOT NULL;
CREATE INDEX tasks_by_owner ON tasks (owner) WHERE owner IS NOT NULL AND done_number IS NULL;

-- The highest completion number that a row has given up (deleted or resubmitted): numbers only grow.
CREATE TABLE completion_floor (
    only        INTEGER PRIMARY KEY CHECK (only = 1),
    done_number INTEGER NOT NULL
) STRICT;
INSERT INTO completion_floor VALUES (1, 0);

-- Earlier attempts of tasks that were retried or resubmitted: what each of them ended with.
CREATE TABLE attempts (
    task_id     TEXT NOT NULL,
    attempt     INTEGER NOT NULL,  -- tasks.retries at the time
    status      TEXT NOT NULL,     -- RETRY, FAILURE or REVOKED
    result      ANY,               -- the exception
    encoding    TEXT,
    traceback   TEXT,
    owner       TEXT,
    started_at  REAL,
    done_at     REAL,
    PRIMARY KEY (task_id, attempt)
) STRICT;


-- Groups --------------------------------------------------------------------------------------------

CREATE TABLE groups (
    number       INTEGER PRIMARY KEY,
    id           TEXT NOT NULL UNIQUE
                 CONSTRAINT "a group id is not empty" CHECK (id <> ''),
    parent_id    TEXT,              -- the task or group that submitted it
    created_at   REAL NOT NULL DEFAULT ((julianday('now') - 2440587.5) * 86400.0),

    -- 0: deleted by name, and kept only because another group contains it.
    saved        INTEGER NOT NULL DEFAULT 1 CHECK (saved IN (0, 1)),

    -- Counts, kept by the triggers. A task that stands twice counts twice; the tasks of nested groups
    -- count as the group's own. Ready: done + failed + revoked = size.
    size         INTEGER NOT NULL DEFAULT 0,
    done         INTEGER NOT NULL DEFAULT 0,
    failed       INTEGER NOT NULL DEFAULT 0,
    revoked      INTEGER NOT NULL DEFAULT 0,

    -- The same for direct members: how many there are, how many of them are DONE tasks, and how many
    -- are nested groups that are DONE as a whole.
    members      INTEGER NOT NULL DEFAULT 0,
    tasks_done   INTEGER NOT NULL DEFAULT 0,
    groups_done  INTEGER NOT NULL DEFAULT 0
) STRICT;

CREATE INDEX groups_by_parent ON groups (parent_id) WHERE parent_id IS NOT NULL;

-- Who is in a group, in order. A member is a task (whether or not it has a row yet) or a saved group.
CREATE TABLE group_members (
    group_id    TEXT NOT NULL,
    position    INTEGER NOT NULL,
    task_id     TEXT,
    child_id    TEXT,
    PRIMARY KEY (group_id, position),
    CONSTRAINT "a member is either a task or a group" CHECK ((task_id IS NULL) <> (child_id IS NULL))
) STRICT, WITHOUT ROWID;

CREATE INDEX group_members_by_child ON group_members (child_id) WHERE child_id IS NOT NULL;

-- Kept by the triggers, for tasks whose group_number is 0 or that have no row yet: in which groups they
-- count, directly or through nested groups.
CREATE TABLE group_tasks (
    task_id      TEXT NOT NULL,
    group_number INTEGER NOT NULL,
    times        INTEGER NOT NULL,            -- how often, nested groups included
    direct       INTEGER NOT NULL,            -- how often as a direct member
    counted      INTEGER NOT NULL DEFAULT 0,  -- 1: it stood in tasks.group_number before, and was counted then
    PRIMARY KEY (task_id, group_number)
) STRICT, WITHOUT ROWID;


-- Owners --------------------------------------------------------------------------------------------

-- Processes that answer for tasks. Each holds a lock on the file `<database>-owners/<id>.lock` for as
-- long as it lives; the kernel drops it when the process dies, however it dies. (`<id>.running` beside it
-- is what a worker of a batch notes before a call.)
CREATE TABLE owners (
    id          TEXT PRIMARY KEY CHECK (id <> ''),
    pid         INTEGER,
    host        TEXT,
    started_at  REAL
) STRICT, WITHOUT ROWID;


-- Rules for tasks -----------------------------------------------------------------------------------

-- Where there are more than two values to compare with, triggers say "= OR =": SQLite makes a table of a longer
-- IN (...) each time it enters the trigger, which took half the time of a finish.

CREATE TRIGGER tasks_final_is_final
AFTER UPDATE OF status, result, encoding, traceback, retries, owner, started_at, done_at, done_number ON tasks
WHEN OLD.done_number IS NOT NULL AND (OLD.status = 'DONE' OR OLD.status = 'FAILURE' OR OLD.status = 'REVOKED')
     AND NOT (NEW.status = 'PENDING' AND OLD.status <> 'DONE' AND NEW.retries = OLD.retries + 1)
     OR OLD.done_number IS NULL AND NEW.done_number IS NOT NULL
     AND (NOT (NEW.status = 'DONE' OR NEW.status = 'FAILURE' OR NEW.status = 'REVOKED')
          OR NEW.done_number <= (SELECT done_number FROM completion_floor WHERE only = 1)
          OR EXISTS (SELECT 1 FROM tasks WHERE done_number >= NEW.done_number AND number <> NEW.number))
BEGIN
    SELECT RAISE(ABORT, 'the task is final: DONE never changes; FAILURE and REVOKED only go to PENDING with retries + 1')
    WHERE OLD.done_number IS NOT NULL;
    SELECT RAISE(ABORT, 'leave done_number out: final tasks get the next one');
END;

CREATE TRIGGER tasks_are_numbered_in_order
AFTER INSERT ON tasks
WHEN NEW.done_number IS NOT NULL
     AND (NOT (NEW.status = 'DONE' OR NEW.status = 'FAILURE' OR NEW.status = 'REVOKED')
          OR NEW.done_number <= (SELECT done_number FROM completion_floor WHERE only = 1)
          OR EXISTS (SELECT 1 FROM tasks WHERE done_number >= NEW.done_number AND number <> NEW.number))
BEGIN
    SELECT RAISE(ABORT, 'leave done_number out: final tasks get the next one');
END;

CREATE TRIGGER tasks_have_one_owner
AFTER UPDATE OF owner ON tasks
WHEN OLD.owner <> NEW.owner AND OLD.status NOT IN ('PENDING', 'RETRY')
     AND NEW.status NOT IN ('PENDING', 'RETRY') AND NEW.status <> 'LOST'
BEGIN
    SELECT RAISE(ABORT, 'another owner runs the task');
END;

CREATE TRIGGER tasks_keep_identity
AFTER UPDATE OF id, number ON tasks
WHEN OLD.id <> NEW.id OR OLD.number <> NEW.number
BEGIN
    SELECT RAISE(ABORT, 'id and number of a task never change');
END;

-- INSERT OR REPLACE would delete a final row without asking any other trigger.
CREATE TRIGGER tasks_are_not_replaced
BEFORE INSERT ON tasks
WHEN EXISTS (SELECT 1 FROM tasks WHERE id = NEW.id) OR EXISTS (SELECT 1 FROM tasks WHERE number = NEW.number)
BEGIN
    SELECT RAISE(ABORT, 'another task, or this one when it is final, can''t be replaced')
    WHERE EXISTS (SELECT 1 FROM tasks WHERE id = NEW.id AND done_number IS NOT NULL)
       OR EXISTS (SELECT 1 FROM tasks WHERE number = NEW.number AND id <> NEW.id);
    -- An unfinished task may be replaced: its groups must not lose it with the old row.
    INSERT OR IGNORE INTO group_tasks (task_id, group_number, times, direct, counted)
    SELECT id, group_number, 1, 1, 1 FROM tasks WHERE id = NEW.id AND group_number > 0;
    UPDATE tasks SET group_number = 0 WHERE id = NEW.id AND group_number > 0;
END;


-- What writers may leave out ------------------------------------------------------------------------

CREATE VIEW next_completion AS
SELECT max(
    coalesce((SELECT max(done_number) FROM tasks WHERE done_number IS NOT NULL), 0),
    (SELECT done_number FROM completion_floor WHERE only = 1)
) + 1 AS done_number;

CREATE TRIGGER tasks_fill_in_insert_start
AFTER INSERT ON tasks
WHEN NEW.status = 'STARTED' AND NEW.started_at IS NULL
BEGIN
    UPDATE tasks SET started_at = (julianday('now') - 2440587.5) * 86400.0 WHERE number = NEW.number;
END;

CREATE TRIGGER tasks_fill_in_insert_retry
AFTER INSERT ON tasks
WHEN NEW.status = 'RETRY'
BEGIN
    DELETE FROM attempts WHERE task_id = NEW.id AND attempt = NEW.retries;
    INSERT INTO attempts (task_id, attempt, status, result, encoding, traceback, owner, started_at, done_at)
    VALUES (NEW.id, NEW.retries, 'RETRY', NEW.result, NEW.encoding, NEW.traceback, NEW.owner, NEW.started_at,
            (julianday('now') - 2440587.5) * 86400.0);
    UPDATE tasks SET retries = NEW.retries + 1 WHERE number = NEW.number;
END;

-- A value that equals what the last custom state left is given all the same, if the statement names the
-- column. Only a trigger OF that column knows; this row is gone again at the statement's end.
CREATE TABLE result_given (
    number      INTEGER PRIMARY KEY  -- tasks.number
) STRICT;

CREATE TRIGGER tasks_result_is_given
BEFORE UPDATE OF result ON tasks
WHEN NEW.done_number IS NULL AND OLD.status NOT IN ('PENDING', 'STARTED') AND NEW.result IS OLD.result
     AND (NEW.status = 'DONE' OR NEW.status = 'FAILURE' OR NEW.status = 'REVOKED')
BEGIN
    INSERT OR IGNORE INTO result_given VALUES (NEW.number);
END;

-- What is rare about a change of status. SQLite enters every trigger to see whether it applies, and sets up
-- room for all of its body first: so the body stands apart, and a plain finish, with everything filled in
-- and one group at most, does not pay for it. (A view with an INSTEAD OF trigger is SQL's procedure.)
CREATE VIEW status_change (
    number, id, status, final, result, encoding, traceback, owner, submitter, retries, started_at, done_at, done_number,
    old_status, old_result, old_encoding, old_traceback, old_owner, old_submitter, old_retries, old_started_at,
    old_done_at, old_done_number
) AS SELECT NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL;

CREATE TRIGGER tasks_change_status
AFTER UPDATE OF status ON tasks
WHEN NEW.status = 'PENDING' OR NEW.status = 'STARTED' OR NEW.status = 'RETRY'
     OR NEW.done_number IS NULL AND (NEW.status = 'DONE' OR NEW.status = 'FAILURE' OR NEW.status = 'REVOKED')
     OR NEW.group_number = 0
BEGIN
    INSERT INTO status_change VALUES (
        NEW.number, NEW.id, NEW.status, NEW.status = 'DONE' OR NEW.status = 'FAILURE' OR NEW.status = 'REVOKED',
        NEW.result, NEW.encoding, NEW.traceback, NEW.owner, NEW.submitter, NEW.retries, NEW.started_at, NEW.done_at,
        NEW.done_number,
        OLD.status, OLD.result, OLD.encoding, OLD.traceback, OLD.owner, OLD.submitter, OLD.retries, OLD.started_at,
        OLD.done_at, OLD.done_number
    );
END;

CREATE TRIGGER status_change_made
INSTEAD OF INSERT ON status_change
BEGIN
    SELECT RAISE(ABORT, 'the task has begun: it does not go back to PENDING, nor start twice')
    WHERE NEW.old_done_number IS NULL
      AND (NEW.status = 'PENDING' AND (NEW.old_status <> 'PENDING' OR NEW.retries <> NEW.old_retries)
           OR NEW.status = 'STARTED' AND NEW.old_status = 'STARTED');

    -- Finished, and the writer left something out. What an unfinished state left in result is not the value,
    -- though a failed attempt's exception may stay.
    UPDATE tasks SET result = NULL, encoding = 'json'
    WHERE number = NEW.number AND NEW.done_number IS NULL AND NEW.final
      AND (NEW.old_status NOT IN ('PENDING', 'STARTED') AND NEW.old_status NOT IN ('RETRY', 'LOST')
           OR NEW.old_status IN ('RETRY', 'LOST') AND NEW.status <> 'FAILURE')
      AND NEW.result IS NEW.old_result
      AND NOT EXISTS (SELECT 1 FROM result_given WHERE number = NEW.number);
    DELETE FROM result_given;
    UPDATE tasks SET
        done_number = (SELECT done_number FROM next_completion),
        done_at = coalesce(NEW.done_at, (julianday('now') - 2440587.5) * 86400.0),
        encoding = CASE typeof(result) WHEN 'blob' THEN encoding ELSE 'json' END,
        traceback = CASE WHEN NEW.traceback IS NEW.old_traceback AND NEW.status <> NEW.old_status
                              AND NOT (NEW.status = 'FAILURE' AND NEW.old_status IN ('RETRY', 'LOST') AND NEW.result IS NEW.old_result)
                         THEN NULL ELSE NEW.traceback END
    WHERE number = NEW.number AND NEW.done_number IS NULL AND NEW.final;

    -- Begun: the last attempt's result goes, and the time is filled in if the writer left it out.
    UPDATE tasks SET
        started_at = CASE WHEN NEW.started_at IS NEW.old_started_at OR NEW.started_at IS NULL
                          THEN (julianday('now') - 2440587.5) * 86400.0 ELSE NEW.started_at END,
        result = CASE WHEN NEW.result IS NEW.old_result THEN NULL ELSE NEW.result END,
        encoding = CASE WHEN NEW.result IS NEW.old_result THEN NULL ELSE NEW.encoding END,
        traceback = CASE WHEN NEW.traceback IS NEW.old_traceback THEN NULL ELSE NEW.traceback END
    WHERE number = NEW.number AND NEW.status = 'STARTED'
      AND (NEW.started_at IS NULL OR NEW.started_at IS NEW.old_started_at OR NEW.old_result IS NOT NULL OR NEW.old_traceback IS NOT NULL);

    -- A failed attempt is kept, and the next one has the next number.
    DELETE FROM attempts
    WHERE task_id = NEW.id AND attempt = NEW.old_retries
      AND (NEW.status = 'RETRY' OR NEW.status = 'PENDING' AND NEW.old_status IN ('FAILURE', 'REVOKED'));
    INSERT INTO attempts (task_id, attempt, status, result, encoding, traceback, owner, started_at, done_at)
    SELECT NEW.id, NEW.old_retries, 'RETRY', NEW.result, NEW.encoding, NEW.traceback, NEW.old_owner, NEW.old_started_at,
           coalesce(NEW.done_at, (julianday('now') - 2440587.5) * 86400.0)
    WHERE NEW.status = 'RETRY';
    UPDATE tasks SET retries = NEW.old_retries + 1, done_at = NULL WHERE number = NEW.number AND NEW.status = 'RETRY';

    -- So is what a resubmitted task had ended with.
    INSERT INTO attempts (task_id, attempt, status, result, encoding, traceback, owner, started_at, done_at)
    SELECT NEW.id, NEW.old_retries, NEW.old_status, NEW.old_result, NEW.old_encoding, NEW.old_traceback, NEW.old_owner, NEW.old_started_at, NEW.old_done_at
    WHERE NEW.status = 'PENDING' AND NEW.old_status IN ('FAILURE', 'REVOKED');
    UPDATE completion_floor SET done_number = NEW.old_done_number
    WHERE NEW.status = 'PENDING' AND done_number < NEW.old_done_number;
    UPDATE tasks SET
        result = NULL, encoding = NULL, traceback = NULL, started_at = NULL, done_at = NULL, done_number = NULL,
        owner = CASE WHEN NEW.owner IS NEW.old_owner THEN NULL ELSE NEW.owner END,
        submitter = CASE WHEN NEW.submitter IS NEW.old_submitter THEN NULL ELSE NEW.submitter END
    WHERE number = NEW.number AND NEW.status = 'PENDING' AND NEW.old_status IN ('FAILURE', 'REVOKED');

    -- The groups of a task that is in several.
    UPDATE groups SET
        done = done + t.times * ((NEW.status = 'DONE') - (NEW.old_status = 'DONE')),
        failed = failed + t.times * ((NEW.status = 'FAILURE') - (NEW.old_status = 'FAILURE')),
        revoked = revoked + t.times * ((NEW.status = 'REVOKED') - (NEW.old_status = 'REVOKED')),
        tasks_done = tasks_done + t.direct * ((NEW.status = 'DONE') - (NEW.old_status = 'DONE'))
    FROM group_tasks AS t WHERE t.task_id = NEW.id AND groups.number = t.group_number;
END;

CREATE TRIGGER tasks_fill_in_insert
AFTER INSERT ON tasks
WHEN NEW.done_number IS NULL AND (NEW.status = 'DONE' OR NEW.status = 'FAILURE' OR NEW.status = 'REVOKED')
BEGIN
    UPDATE tasks SET
        done_number = (SELECT done_number FROM next_completion),
        done_at = coalesce(NEW.done_at, (julianday('now') - 2440587.5) * 86400.0),
        encoding = CASE typeof(NEW.result) WHEN 'blob' THEN NEW.encoding ELSE 'json' END
    WHERE number = NEW.number;
END;

CREATE TRIGGER tasks_forget
AFTER DELETE ON tasks
BEGIN
    DELETE FROM attempts WHERE task_id = OLD.id;
    UPDATE completion_floor SET done_number = OLD.done_number WHERE done_number < OLD.done_number;
    -- Its groups keep the id and wait for it anew.
    UPDATE groups SET
        done = done - t.times * (OLD.status = 'DONE'),
        failed = failed - t.times * (OLD.status = 'FAILURE'),
        revoked = revoked - t.times * (OLD.status = 'REVOKED'),
        tasks_done = tasks_done - t.direct * (OLD.status = 'DONE')
    FROM group_tasks AS t WHERE t.task_id = OLD.id AND groups.number = t.group_number;
    UPDATE groups SET
        done = done - (OLD.status = 'DONE'),
        failed = failed - (OLD.status = 'FAILURE'),
        revoked = revoked - (OLD.status = 'REVOKED'),
        tasks_done = tasks_done - (OLD.status = 'DONE')
    WHERE number = OLD.group_number;
    INSERT INTO group_tasks (task_id, group_number, times, direct, counted)
    SELECT OLD.id, OLD.group_number, 1, 1, 1 WHERE OLD.group_number > 0;
END;


-- Counting ------------------------------------------------------------------------------------------

-- A task in several groups is seen to by tasks_change_status.
CREATE TRIGGER groups_count_changed_task
AFTER UPDATE OF status ON tasks
WHEN NEW.group_number > 0
     AND (NEW.status = 'DONE' OR NEW.status = 'FAILURE' OR NEW.status = 'REVOKED')
      <> (OLD.status = 'DONE' OR OLD.status = 'FAILURE' OR OLD.status = 'REVOKED')
BEGIN
    UPDATE groups SET
        done = done + (NEW.status = 'DONE') - (OLD.status = 'DONE'),
        failed = failed + (NEW.status = 'FAILURE') - (OLD.status = 'FAILURE'),
        revoked = revoked + (NEW.status = 'REVOKED') - (OLD.status = 'REVOKED'),
        tasks_done = tasks_done + (NEW.status = 'DONE') - (OLD.status = 'DONE')
    WHERE number = NEW.group_number;
END;

CREATE TRIGGER tasks_find_groups
AFTER INSERT ON tasks
WHEN EXISTS (SELECT 1 FROM group_tasks WHERE task_id = NEW.id)
BEGIN
    UPDATE tasks SET group_number = 0 WHERE number = NEW.number;
END;

CREATE TRIGGER groups_count_new_task
AFTER INSERT ON tasks
WHEN NEW.status = 'DONE' OR NEW.status = 'FAILURE' OR NEW.status = 'REVOKED'
BEGIN
    UPDATE groups SET
        done = done + t.times * (NEW.status = 'DONE'),
        failed = failed + t.times * (NEW.status = 'FAILURE'),
        revoked = revoked + t.times * (NEW.status = 'REVOKED'),
        tasks_done = tasks_done + t.direct * (NEW.status = 'DONE')
    FROM group_tasks AS t WHERE t.task_id = NEW.id AND groups.number = t.group_number;
END;

-- A nested group that became, or stopped being, wholly DONE is one member more, or less, where it is in.
CREATE TRIGGER groups_count_nested_group
AFTER UPDATE OF size, done ON groups
WHEN (NEW.done = NEW.size) <> (OLD.done = OLD.size)
BEGIN
    UPDATE groups SET groups_done = groups_done + m.times * ((NEW.done = NEW.size) - (OLD.done = OLD.size))
    FROM (SELECT group_id, count(*) AS times FROM group_members WHERE child_id = NEW.id GROUP BY group_id) AS m
    WHERE groups.id = m.group_id;
END;


-- Membership ----------------------------------------------------------------------------------------

CREATE TRIGGER group_members_fit
BEFORE INSERT ON group_members
WHEN NEW.child_id IS NOT NULL
     OR EXISTS (SELECT 1 FROM group_members WHERE group_id = NEW.group_id AND position = NEW.position)
BEGIN
    SELECT RAISE(ABORT, 'the position is taken')
    WHERE EXISTS (SELECT 1 FROM group_members WHERE group_id = NEW.group_id AND position = NEW.position);
    SELECT RAISE(ABORT, 'the nested group is not saved yet')
    WHERE NEW.child_id IS NOT NULL AND NOT EXISTS (SELECT 1 FROM groups WHERE id = NEW.child_id);
    SELECT RAISE(ABORT, 'a group can''t contain itself')
    WHERE NEW.child_id IS NOT NULL AND EXISTS (
        WITH RECURSIVE above (id) AS (
            VALUES (NEW.group_id)
            UNION SELECT m.group_id FROM above JOIN group_members AS m ON m.child_id = above.id
        )
        SELECT 1 FROM above WHERE id = NEW.child_id
    );
END;

CREATE TRIGGER group_members_do_not_move
BEFORE UPDATE ON group_members
BEGIN
    SELECT RAISE(ABORT, 'delete the member and insert another');
END;

-- What is rare about a new member; apart for the same reason as status_change.
CREATE VIEW member_added (group_id, task_id, child_id) AS SELECT NULL, NULL, NULL;

CREATE TRIGGER group_members_add
AFTER INSERT ON group_members
BEGIN
    -- Plain: the task has a row, is in no group and not final, and no group contains this one. Then its own row
    -- can keep where it counts.
    UPDATE tasks SET group_number = (SELECT number FROM groups WHERE id = NEW.group_id)
    WHERE id = NEW.task_id AND group_number IS NULL AND done_number IS NULL
      AND EXISTS (SELECT 1 FROM groups WHERE id = NEW.group_id)
      AND NOT EXISTS (SELECT 1 FROM group_members WHERE child_id = NEW.group_id);
    UPDATE groups SET members = members + 1, size = size + 1 WHERE id = NEW.group_id AND changes() = 1;
    INSERT INTO member_added SELECT NEW.group_id, NEW.task_id, NEW.child_id WHERE changes() = 0;
END;

CREATE TRIGGER member_added_task
INSTEAD OF INSERT ON member_added
WHEN NEW.task_id IS NOT NULL
BEGIN
    INSERT INTO groups (id) SELECT NEW.group_id WHERE NOT EXISTS (SELECT 1 FROM groups WHERE id = NEW.group_id);
    UPDATE groups SET members = members + 1 WHERE id = NEW.group_id;

    -- In a second group or place, final already, or in a nested group: group_tasks has to keep it.
    INSERT INTO group_tasks (task_id, group_number, times, direct, counted)
    SELECT id, group_number, 1, 1, 1 FROM tasks WHERE id = NEW.task_id AND group_number > 0;
    UPDATE tasks SET group_number = 0
    WHERE id = NEW.task_id
      AND (group_number > 0 OR done_number IS NOT NULL
           OR EXISTS (SELECT 1 FROM group_members WHERE child_id = NEW.group_id));
    INSERT INTO group_tasks (task_id, group_number, times, direct)
    WITH RECURSIVE above (id) AS (
        SELECT NEW.group_id WHERE NOT EXISTS (SELECT 1 FROM tasks WHERE id = NEW.task_id AND group_number IS NULL)
        UNION ALL SELECT m.group_id FROM above JOIN group_members AS m ON m.child_id = above.id
    )
    SELECT NEW.task_id, groups.number, count(*), sum(groups.id = NEW.group_id)
    FROM above JOIN groups ON groups.id = above.id WHERE true GROUP BY groups.number
    ON CONFLICT (task_id, group_number)
    DO UPDATE SET times = group_tasks.times + excluded.times, direct = group_tasks.direct + excluded.direct;

    -- Else the task itself can.
    UPDATE groups SET size = size + 1
    WHERE id = NEW.group_id AND EXISTS (SELECT 1 FROM tasks WHERE id = NEW.task_id AND group_number IS NULL);
    UPDATE tasks SET group_number = (SELECT number FROM groups WHERE id = NEW.group_id)
    WHERE id = NEW.task_id AND group_number IS NULL;
END;

CREATE TRIGGER member_added_group
INSTEAD OF INSERT ON member_added
WHEN NEW.child_id IS NOT NULL
BEGIN
    INSERT INTO groups (id) SELECT NEW.group_id WHERE NOT EXISTS (SELECT 1 FROM groups WHERE id = NEW.group_id);
    UPDATE groups SET
        members = members + 1,
        groups_done = groups_done + (SELECT child.done = child.size FROM groups AS child WHERE child.id = NEW.child_id)
    WHERE id = NEW.group_id;
    -- From now on its tasks count in more than one group.
    INSERT INTO group_tasks (task_id, group_number, times, direct, counted)
    WITH RECURSIVE below (id) AS (
        VALUES (NEW.child_id)
        UNION SELECT m.child_id FROM below JOIN group_members AS m ON m.group_id = below.id AND m.child_id IS NOT NULL
    )
    SELECT DISTINCT tasks.id, tasks.group_number, 1, 1, 1
    FROM below JOIN group_members AS m ON m.group_id = below.id JOIN tasks ON tasks.id = m.task_id
    WHERE tasks.group_number > 0;
    UPDATE tasks SET group_number = 0
    WHERE group_number > 0 AND id IN (
        WITH RECURSIVE below (id) AS (
            VALUES (NEW.child_id)
            UNION SELECT m.child_id FROM below JOIN group_members AS m ON m.group_id = below.id AND m.child_id IS NOT NULL
        )
        SELECT m.task_id FROM below JOIN group_members AS m ON m.group_id = below.id WHERE m.task_id IS NOT NULL
    );
    INSERT INTO group_tasks (task_id, group_number, times, direct)
    WITH RECURSIVE above (id) AS (
        VALUES (NEW.group_id)
        UNION ALL SELECT m.group_id FROM above JOIN group_members AS m ON m.child_id = above.id
    ), below (id) AS (
        VALUES (NEW.child_id)
        UNION ALL SELECT m.child_id FROM below JOIN group_members AS m ON m.group_id = below.id AND m.child_id IS NOT NULL
    )
    SELECT m.task_id, groups.number, count(*), 0
    FROM below JOIN group_members AS m ON m.group_id = below.id AND m.task_id IS NOT NULL
    JOIN above JOIN groups ON groups.id = above.id WHERE true GROUP BY m.task_id, groups.number
    ON CONFLICT (task_id, group_number) DO UPDATE SET times = group_tasks.times + excluded.times;
END;

CREATE TRIGGER group_members_remove_task
AFTER DELETE ON group_members
WHEN OLD.task_id IS NOT NULL
BEGIN
    UPDATE groups SET members = members - 1 WHERE id = OLD.group_id;
    UPDATE group_tasks SET times = group_tasks.times - gone.times, direct = group_tasks.direct - gone.direct
    FROM (
        WITH RECURSIVE above (id) AS (
            VALUES (OLD.group_id)
            UNION ALL SELECT m.group_id FROM above JOIN group_members AS m ON m.child_id = above.id
        )
        SELECT groups.number, count(*) AS times, sum(groups.id = OLD.group_id) AS direct
        FROM above JOIN groups ON groups.id = above.id GROUP BY groups.number
    ) AS gone WHERE group_tasks.task_id = OLD.task_id AND group_tasks.group_number = gone.number;
    DELETE FROM group_tasks WHERE task_id = OLD.task_id AND times = 0;
    UPDATE groups SET
        size = size - 1,
        done = done - (t.status = 'DONE'),
        failed = failed - (t.status = 'FAILURE'),
        revoked = revoked - (t.status = 'REVOKED'),
        tasks_done = tasks_done - (t.status = 'DONE')
    FROM tasks AS t WHERE t.id = OLD.task_id AND t.group_number = groups.number AND groups.id = OLD.group_id;
    UPDATE tasks SET group_number = NULL
    WHERE id = OLD.task_id
      AND (group_number = (SELECT number FROM groups WHERE id = OLD.group_id)
           OR group_number = 0 AND NOT EXISTS (SELECT 1 FROM group_tasks WHERE task_id = OLD.task_id));
END;

CREATE TRIGGER group_members_remove_group
AFTER DELETE ON group_members
WHEN OLD.child_id IS NOT NULL
BEGIN
    UPDATE groups SET
        members = members - 1,
        groups_done = groups_done - (SELECT child.done = child.size FROM groups AS child WHERE child.id = OLD.child_id)
    WHERE id = OLD.group_id;
    UPDATE group_tasks SET times = group_tasks.times - gone.times
    FROM (
        WITH RECURSIVE above (id) AS (
            VALUES (OLD.group_id)
            UNION ALL SELECT m.group_id FROM above JOIN group_members AS m ON m.child_id = above.id
        ), below (id) AS (
            VALUES (OLD.child_id)
            UNION ALL SELECT m.child_id FROM below JOIN group_members AS m ON m.group_id = below.id AND m.child_id IS NOT NULL
        )
        SELECT m.task_id, groups.number, count(*) AS times
        FROM below JOIN group_members AS m ON m.group_id = below.id AND m.task_id IS NOT NULL
        JOIN above JOIN groups ON groups.id = above.id GROUP BY m.task_id, groups.number
    ) AS gone WHERE group_tasks.task_id = gone.task_id AND group_tasks.group_number = gone.number;
    DELETE FROM group_tasks WHERE times = 0;
    UPDATE tasks SET group_number = NULL
    WHERE group_number = 0 AND NOT EXISTS (SELECT 1 FROM group_tasks WHERE task_id = tasks.id)
      AND id IN (
        WITH RECURSIVE below (id) AS (
            VALUES (OLD.child_id)
            UNION SELECT m.child_id FROM below JOIN group_members AS m ON m.group_id = below.id AND m.child_id IS NOT NULL
        )
        SELECT m.task_id FROM below JOIN group_members AS m ON m.group_id = below.id WHERE m.task_id IS NOT NULL
    );
END;

CREATE TRIGGER group_tasks_added
AFTER INSERT ON group_tasks
WHEN NOT NEW.counted
BEGIN
    UPDATE groups SET size = size + NEW.times WHERE number = NEW.group_number;
    UPDATE groups SET
        done = done + NEW.times * (t.status = 'DONE'),
        failed = failed + NEW.times * (t.status = 'FAILURE'),
        revoked = revoked + NEW.times * (t.status = 'REVOKED'),
        tasks_done = tasks_done + NEW.direct * (t.status = 'DONE')
    FROM tasks AS t WHERE t.id = NEW.task_id AND t.done_number IS NOT NULL AND groups.number = NEW.group_number;
END;

CREATE TRIGGER group_tasks_changed
AFTER UPDATE OF times, direct ON group_tasks
BEGIN
    UPDATE groups SET size = size + NEW.times - OLD.times WHERE number = NEW.group_number;
    UPDATE groups SET
        done = done + (NEW.times - OLD.times) * (t.status = 'DONE'),
        failed = failed + (NEW.times - OLD.times) * (t.status = 'FAILURE'),
        revoked = revoked + (NEW.times - OLD.times) * (t.status = 'REVOKED'),
        tasks_done = tasks_done + (NEW.direct - OLD.direct) * (t.status = 'DONE')
    FROM tasks AS t WHERE t.id = NEW.task_id AND t.done_number IS NOT NULL AND groups.number = NEW.group_number;
END;

CREATE TRIGGER groups_keep_identity
AFTER UPDATE OF id, number ON groups
WHEN OLD.id <> NEW.id OR OLD.number <> NEW.number
BEGIN
    SELECT RAISE(ABORT, 'id and number of a group never change');
END;

CREATE TRIGGER groups_are_not_replaced
BEFORE INSERT ON groups
WHEN EXISTS (SELECT 1 FROM groups WHERE id = NEW.id OR number = NEW.number)
BEGIN
    SELECT RAISE(ABORT, 'the group exists: change its members instead');
END;

-- Its members go with a group, its tasks stay.
CREATE TRIGGER groups_delete
BEFORE DELETE ON groups
BEGIN
    SELECT RAISE(ABORT, 'another group contains this one')
    WHERE EXISTS (SELECT 1 FROM group_members WHERE child_id = OLD.id);
    DELETE FROM group_members WHERE group_id = OLD.id;
END;


-- For people ----------------------------------------------------------------------------------------

CREATE VIEW task_overview AS
SELECT
    id,
    name,
    status,
    CASE
        WHEN encoding = 'pickle' THEN '(pickle, ' || length(result) || ' bytes)'
        WHEN status IN ('FAILURE', 'RETRY', 'LOST', 'REVOKED') AND json_valid(result) AND json_type(result) = 'object'
            THEN json_extract(result, '$.type') || ': ' || json_extract(result, '$.text')
        ELSE result
    END AS result,
    retries,
    strftime('%Y-%m-%d %H:%M:%f', created_at, 'unixepoch') AS created_utc,
    strftime('%Y-%m-%d %H:%M:%f', started_at, 'unixepoch') AS started_utc,
    strftime('%Y-%m-%d %H:%M:%f', done_at, 'unixepoch') AS done_utc,
    round(done_at - coalesce(started_at, created_at), 3) AS seconds,
    (SELECT pid || '@' || host FROM owners WHERE owners.id = tasks.owner) AS worker,
    parent_id
FROM tasks;

CREATE VIEW group_overview AS
SELECT
    id,
    CASE
        WHEN done + failed + revoked < size THEN 'WAITING'
        WHEN failed > 0 THEN 'FAILURE'
        WHEN revoked > 0 THEN 'REVOKED'
        ELSE 'DONE'
    END AS status,
    size,
    done,
    failed,
    revoked,
    size - done - failed - revoked AS waiting,
    strftime('%Y-%m-%d %H:%M:%f', created_at, 'unixepoch') AS created_utc,
    parent_id
FROM groups
WHERE saved;


PRAGMA application_id = 0x6c657272;  -- "lerr"
PRAGMA user_version = 1;
