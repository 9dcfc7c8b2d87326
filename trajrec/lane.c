/* The straight way of a step, without a line of Python: what `trajrec.straight` hands over and takes back.

   A step costs the training thread a few hundred microseconds when its hooks are Python, nearly all of it cache misses:
   a step of training has pushed the interpreter's data out, and it comes back line by line. Here the same is done with
   a tenth of the lines. Nothing is decided here: every step that is not like the one before in all that is looked at is
   left to the Python code, which is given what was seen of it so far. Where this file was not compiled, Python does all.

   READY --draw--> DRAWN --forward--> FORWARDED --backward--> BACKWARD --before--> PREPARED --after--> READY
   anything else --> OFF, and `left(stage)` is called: see trajrec/straight.py.

   What is counted here, Python learns by `settled()`, before anything of Python is called that goes by it. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <structmember.h>
#include <time.h>

/* trajrec/folding.c */
int can_fold(void);
uint32_t copy_folding(char *to, const char *from, size_t size, uint32_t crc);
void await_stores(void);

enum { OFF, READY, DRAWN, FORWARDED, BACKWARD, PREPARED };
enum { RECORD_HEAD = 64, SLOT_BYTES = 64, LONG_COPY = 1 << 20, OTHER_PARAMETERS = 2 };

typedef struct {
    const char *from;
    Py_ssize_t size;
} Memory;

typedef struct {
    PyObject_HEAD
    int stage, busy, cleared;
    unsigned long holder;
    /* what a step must be like, given by `arm` */
    PyObject *model, *optimizer, *loader, *serial, *modules, *modes, *optimized, *grads, *values, *views, *pointers;
    PyObject *keys, *options, *sizes, *hyper;
    PyObject *get_state, *is_grad_enabled, *crc32, *tensor, *float32, *look, *note, *summed, *renew, *onward, *left, *settled;
    long long entry, before_us, stop, epoch, groups, names, look_every, state_bytes;
    Memory *weights; /* where the values of `views` are */
    Py_buffer map;
    long long slots, slots_at, arena_at, arena_bytes, arena_head, arena_until, rows_at, row_bytes;
    char *draft; /* the record, before it goes into the arena */
    size_t draft_bytes;
    /* what was seen of the step */
    PyObject *content, *inputs, *before, *sketch, *loss, *rng;
    char *before_at; /* the bytes of `before` */
    int64_t *ids;    /* as numbers: a sampler may use its list again, and Python's integers are far apart later on */
    Py_ssize_t batch, ids_room;
    /* for trajrec/stopwatch.py; all but the first two since Python was last told */
    long long time_every, watched, counted, looked;
    double seconds;
} Lane;

static PyObject *s_training, *s_grad, *s_requires_grad, *s_data_ptr, *s_item, *s_dtype, *s_is_cpu, *s_ndim, *s_is_neg, *s_params,
    *s_param_groups, *s_popleft, *s_receive;

static void forget_step(Lane *lane) {
    Py_CLEAR(lane->content);
    Py_CLEAR(lane->inputs);
    Py_CLEAR(lane->before);
    Py_CLEAR(lane->sketch);
    Py_CLEAR(lane->loss);
    Py_CLEAR(lane->rng);
}

/* One thread at a time: an event lets go of the interpreter's lock where it copies and sums, and another thread may call
   the model meanwhile. Python that an event calls may come back here. */
static void hold(Lane *lane) {
    unsigned long me = PyThread_get_thread_ident();
    while (lane->busy && lane->holder != me) {
        struct timespec moment = {0, 20000};
        Py_BEGIN_ALLOW_THREADS
        nanosleep(&moment, NULL);
        Py_END_ALLOW_THREADS
    }
    lane->busy++;
    lane->holder = me;
}

static void release(Lane *lane) { lane->busy--; }

static int called(PyObject *done) {
    Py_XDECREF(done);
    return done ? 0 : -1;
}

/* Python's own counts are made right. */
static int settle(Lane *lane) {
    if (!lane->settled) return 0;
    int failed = called(PyObject_CallNoArgs(lane->settled)) < 0;
    lane->counted = lane->looked = 0;
    lane->seconds = 0;
    return failed ? -1 : 0;
}

/* Leaves the straight way: Python takes over what was seen. Returns 0, or -1 with an exception. */
static int leave(Lane *lane) {
    int stage = lane->stage;
    if (stage == OFF) return 0;
    if (settle(lane) < 0) return -1; /* nothing is lost: it can be left again */
    lane->stage = OFF;
    int failed = called(PyObject_CallFunction(lane->left, "i", stage)) < 0;
    forget_step(lane);
    return failed ? -1 : 0;
}

/* Asks for memory that will be read in a moment: the step has pushed it out of the caches. */
static void ask_for(const char *from, long long size) {
#ifdef __GNUC__
    for (long long k = 0; k < size; k += 64) __builtin_prefetch(from + k);
#endif
}

/* ---- what is looked at: 1 if as expected, 0 if not, -1 with an exception ---- */

static int is_attribute(PyObject *of, PyObject *name, PyObject *expected) {
    PyObject *found = PyObject_GetAttr(of, name);
    if (!found) return -1;
    int same = found == expected;
    Py_DECREF(found);
    return same;
}

static int same_modes(Lane *lane) {
    for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(lane->modules); k++) {
        int same = is_attribute(PyTuple_GET_ITEM(lane->modules, k), s_training, PyTuple_GET_ITEM(lane->modes, k));
        if (same != 1) return same;
    }
    return 1;
}

/* `grads` has None for a parameter without a gradient, and else its `requires_grad`. */
static int same_grads(Lane *lane) {
    for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(lane->optimized); k++) {
        PyObject *p = PyTuple_GET_ITEM(lane->optimized, k), *expected = PyTuple_GET_ITEM(lane->grads, k);
        int is_none = is_attribute(p, s_grad, Py_None);
        if (is_none < 0) return -1;
        if (is_none != (expected == Py_None)) return 0;
        int same = is_none ? 1 : is_attribute(p, s_requires_grad, expected);
        if (same != 1) return same;
    }
    return 1;
}

static int same_group(Lane *lane, PyObject *group, Py_ssize_t index) {
    PyObject *known = PyTuple_GET_ITEM(lane->options, index);
    for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(lane->keys); k++) {
        PyObject *value = PyDict_GetItemWithError(group, PyTuple_GET_ITEM(lane->keys, k));
        if (!value && PyErr_Occurred()) return -1;
        int same = PyObject_RichCompareBool(value ? value : Py_None, PyTuple_GET_ITEM(known, k), Py_EQ);
        if (same != 1) return same;
    }
    return 1;
}

static int same_options(Lane *lane) {
    PyObject *groups = PyObject_GetAttr(lane->optimizer, s_param_groups);
    if (!groups) return -1;
    int same = PyList_Check(groups) && PyList_GET_SIZE(groups) == PyTuple_GET_SIZE(lane->options) ? 1 : OTHER_PARAMETERS;
    for (Py_ssize_t k = 0; same == 1 && k < PyTuple_GET_SIZE(lane->options); k++) {
        PyObject *group = PyList_GET_ITEM(groups, k);
        PyObject *params = PyDict_Check(group) ? PyDict_GetItemWithError(group, s_params) : NULL;
        if (!params || PyObject_Size(params) != PyLong_AsLong(PyTuple_GET_ITEM(lane->sizes, k))) same = OTHER_PARAMETERS;
        else same = same_group(lane, group, k);
    }
    Py_DECREF(groups);
    return PyErr_Occurred() ? -1 : same;
}

static int address_of(PyObject *tensor, unsigned long long *address) {
    PyObject *found = PyObject_CallMethodNoArgs(tensor, s_data_ptr);
    if (!found) return -1;
    *address = PyLong_AsUnsignedLongLong(found);
    Py_DECREF(found);
    return PyErr_Occurred() ? -1 : 0;
}

static int same_places(Lane *lane) {
    for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(lane->values); k++) {
        unsigned long long place;
        if (address_of(PyTuple_GET_ITEM(lane->values, k), &place) < 0) return -1;
        if (place != PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(lane->pointers, k))) return PyErr_Occurred() ? -1 : 0;
    }
    return 1;
}

/* Keeps the generator's state before the step where the step has drawn from it. */
static int compare_states(Lane *lane) {
    PyObject *after = PyObject_CallNoArgs(lane->get_state);
    if (!after) return -1;
    unsigned long long place;
    int failed = address_of(after, &place) < 0;
    if (!failed && memcmp(lane->before_at, (void *)(uintptr_t)place, lane->state_bytes))
        failed = !(lane->rng = PyBytes_FromStringAndSize(lane->before_at, lane->state_bytes));
    Py_DECREF(after);
    return failed ? -1 : 1;
}

/* ---- the events: 1 if taken, 0 if left to Python, -1 with an exception ---- */

static int wants_look(Lane *lane, long long step) { return lane->summed == Py_False || step % lane->look_every < 2; }

/* Keeps ids that are 64-bit integers. */
static int keep_ids(Lane *lane, PyObject *ids) {
    lane->batch = PyList_GET_SIZE(ids);
    if (lane->batch > lane->ids_room) {
        int64_t *room = PyMem_Realloc(lane->ids, lane->batch * sizeof *room);
        if (!room) return PyErr_NoMemory(), -1;
        lane->ids = room, lane->ids_room = lane->batch;
    }
    for (Py_ssize_t k = 0; k < lane->batch; k++) {
        int overflow = !PyLong_CheckExact(PyList_GET_ITEM(ids, k));
        if (!overflow) lane->ids[k] = PyLong_AsLongLongAndOverflow(PyList_GET_ITEM(ids, k), &overflow);
        if (overflow) return 0;
    }
    return 1;
}

static PyObject *list_of_ids(Lane *lane, void *unused) {
    PyObject *ids = PyList_New(lane->batch);
    for (Py_ssize_t k = 0; ids && k < lane->batch; k++) {
        PyObject *id = PyLong_FromLongLong(lane->ids[k]);
        if (!id) Py_CLEAR(ids);
        else PyList_SET_ITEM(ids, k, id);
    }
    return ids;
}

static int drawn(Lane *lane, PyObject *loader, PyObject *ids, PyObject *content, PyObject *serial) {
    if (loader != lane->loader || !PyList_CheckExact(ids) || !PyList_GET_SIZE(ids)) return 0;
    int same = PyObject_RichCompareBool(serial, lane->serial, Py_EQ);
    if (same != 1) return same;
    if ((same = keep_ids(lane, ids)) != 1) return same;
    long long step = lane->entry - lane->before_us;
    if (wants_look(lane, step)) {
        PyObject *own = list_of_ids(lane, NULL);
        PyObject *sketch = own ? PyObject_CallFunction(lane->look, "OOL", own, content, step) : NULL;
        Py_XDECREF(own);
        if (!sketch) return -1;
        Py_XSETREF(lane->sketch, sketch);
    }
    Py_XSETREF(lane->content, Py_NewRef(content));
    lane->stage = DRAWN;
    return 1;
}

static int forwarded(Lane *lane, PyObject *inputs, PyObject *named) {
    if (lane->stage != DRAWN || PyObject_Size(named)) return 0;
    PyObject *gradients = PyObject_CallNoArgs(lane->is_grad_enabled);
    if (!gradients) return -1;
    int taken = gradients == Py_True ? is_attribute(lane->model, s_training, Py_True) : 0;
    Py_DECREF(gradients);
    if (taken != 1) return taken;
    unsigned long long place;
    if (!(lane->before = PyObject_CallNoArgs(lane->get_state)) || address_of(lane->before, &place) < 0) return -1;
    lane->before_at = (char *)(uintptr_t)place;
    lane->inputs = Py_NewRef(inputs);
    lane->stage = FORWARDED;
    return 1;
}

static int is_zero(PyObject *number) {
    if (!number) return -1;
    long value = PyLong_AsLong(number);
    Py_DECREF(number);
    return value == -1 && PyErr_Occurred() ? -1 : !value;
}

/* Whether a loss is one float32 that lies in memory as it is. */
static int is_plain(Lane *lane, PyObject *loss) {
    int plain = (PyObject *)Py_TYPE(loss) == lane->tensor;
    if (plain == 1) plain = is_attribute(loss, s_dtype, lane->float32);
    if (plain == 1) plain = is_attribute(loss, s_is_cpu, Py_True);
    if (plain == 1) plain = is_zero(PyObject_GetAttr(loss, s_ndim));
    if (plain == 1) plain = is_zero(PyObject_CallMethodNoArgs(loss, s_is_neg));
    return plain;
}

/* `loss.item()`, but a plain one is read where it is: that takes much less code, which is cold. */
static PyObject *value_of(Lane *lane, PyObject *loss) {
    unsigned long long place;
    int plain = is_plain(lane, loss);
    if (plain < 0) return NULL;
    if (plain && address_of(loss, &place) == 0) return PyFloat_FromDouble(*(float *)(uintptr_t)place);
    if (plain && !PyErr_ExceptionMatches(PyExc_RuntimeError)) return NULL;
    PyErr_Clear(); /* a tensor without memory, as torch.func has them */
    return PyObject_CallMethodNoArgs(loss, s_item);
}

static int gone_back(Lane *lane, PyObject *loss) {
    int is_tensor = lane->stage == FORWARDED ? PyObject_IsInstance(loss, lane->tensor) : 0;
    if (is_tensor != 1) return is_tensor;
    PyObject *value = value_of(lane, loss);
    if (!value) { /* not one number: Python knows what to do */
        if (!PyErr_ExceptionMatches(PyExc_RuntimeError) && !PyErr_ExceptionMatches(PyExc_ValueError)) return -1;
        PyErr_Clear();
        return 0;
    }
    if (!PyFloat_CheckExact(value)) {
        Py_DECREF(value);
        return 0;
    }
    lane->loss = value;
    lane->stage = BACKWARD;
    lane->cleared = 0;
    return 1;
}

static int renewed(Lane *lane) {
    PyObject *found = settle(lane) < 0 ? NULL : PyObject_CallNoArgs(lane->renew);
    if (!found) return -1;
    int taken = found != Py_None;
    if (taken) {
        Py_XSETREF(lane->options, Py_NewRef(PyTuple_GetItem(found, 0)));
        Py_XSETREF(lane->hyper, Py_NewRef(PyTuple_GetItem(found, 1)));
    }
    Py_DECREF(found);
    return taken;
}

static int prepared(Lane *lane, PyObject *arguments, PyObject *options) {
    if (lane->stage != BACKWARD || PyObject_Size(options) || PyObject_Size(arguments) != 1) return 0;
    ask_for(lane->before_at, lane->state_bytes);
    int same = same_modes(lane);
    if (same == 1) same = same_grads(lane);
    if (same == 1) {
        same = same_options(lane);
        if (same == 0) same = renewed(lane);
        if (same == OTHER_PARAMETERS) return 0;
    }
    if (same == 1) same = compare_states(lane);
    if (same == 1) lane->stage = PREPARED;
    return same;
}

/* ---- the record: as trajrec/runfile/codec.py has it, into the ring, as trajrec/runfile/ring.py has it ---- */

static int checksum(Lane *lane, PyObject *data, uint32_t *crc) {
    PyObject *sum = PyObject_CallFunction(lane->crc32, "OI", data, *crc);
    if (!sum) return -1;
    *crc = (uint32_t)PyLong_AsUnsignedLong(sum);
    Py_DECREF(sum);
    return PyErr_Occurred() ? -1 : 0;
}

/* Sums a parameter, and copies it where there is a place for it. */
static int take_in(Lane *lane, PyObject *parameter, Memory memory, char *to, uint32_t *crc) {
    int folds = can_fold();
    if (!folds && checksum(lane, parameter, crc) < 0) return -1;
    PyThreadState *released = memory.size > LONG_COPY ? PyEval_SaveThread() : NULL;
    if (folds) *crc = copy_folding(to, memory.from, memory.size, *crc);
    else if (to) memcpy(to, memory.from, memory.size);
    if (released) PyEval_RestoreThread(released);
    return 0;
}

/* Sums the weights, and copies them to `row` if there is one. */
static int take_in_all(Lane *lane, char *row, uint32_t *crc) {
    *crc = 0;
    for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(lane->views); k++) {
        if (take_in(lane, PyTuple_GET_ITEM(lane->views, k), lane->weights[k], row, crc) < 0) return -1;
        row = row ? row + lane->weights[k].size : NULL;
    }
    return 0;
}

static double now(void) {
    struct timespec t;
    timespec_get(&t, TIME_UTC);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static char *put(char *to, const void *value, size_t size) {
    memcpy(to, value, size);
    return to + size;
}

static char *put_integer(char *to, int64_t value) { return put(to, &value, 8); }

static size_t record_bytes(Lane *lane) {
    size_t rng = lane->rng ? (size_t)PyBytes_GET_SIZE(lane->rng) : 0, sketched = lane->sketch && lane->sketch != Py_None;
    return RECORD_HEAD + PyBytes_GET_SIZE(lane->hyper) + 8 * lane->batch + rng + 32 * sketched;
}

static char *draft_of(Lane *lane, size_t size) {
    if (size > lane->draft_bytes) {
        char *draft = PyMem_Realloc(lane->draft, size);
        if (!draft) return (char *)PyErr_NoMemory();
        lane->draft = draft, lane->draft_bytes = size;
    }
    return lane->draft;
}

static int encode(Lane *lane, char *to, uint32_t crc) {
    Py_ssize_t rng = lane->rng ? PyBytes_GET_SIZE(lane->rng) : 0;
    uint32_t words[4] = {crc, (uint32_t)lane->groups, (uint32_t)lane->names, 0};
    double numbers[2] = {PyFloat_AS_DOUBLE(lane->loss), now()};
    to = put_integer(put_integer(to, lane->entry), lane->epoch);
    to = put(put(to, numbers, sizeof numbers), words, sizeof words);
    to = put_integer(put_integer(to, lane->batch), rng);
    to = put(to, PyBytes_AS_STRING(lane->hyper), PyBytes_GET_SIZE(lane->hyper));
    to = put(to, lane->ids, 8 * lane->batch);
    if (rng) to = put(to, PyBytes_AS_STRING(lane->rng), rng);
    if (lane->sketch && lane->sketch != Py_None) {
        to = put_integer(put_integer(put_integer(to, 0), 1), 0); /* no parts, one digest, no changes */
        put_integer(to, PyLong_AsLongLong(lane->sketch));
    }
    return PyErr_Occurred() ? -1 : 0;
}

/* Puts a record into the arena, and sums it. */
static int send(Lane *lane, char *to, size_t size, uint32_t *crc) {
    if (can_fold()) {
        *crc = copy_folding(to, lane->draft, size, *crc);
        return 0;
    }
    memcpy(to, lane->draft, size);
    PyObject *data = PyMemoryView_FromMemory(lane->draft, (Py_ssize_t)size, PyBUF_READ);
    int failed = !data || checksum(lane, data, crc) < 0;
    Py_XDECREF(data);
    return failed ? -1 : 0;
}

/* 1 if the record was published, 0 if there is no room for it at the arena's head. */
static int publish(Lane *lane) {
    long long size = (long long)record_bytes(lane), place = lane->arena_head, entry = lane->entry;
    if (place % lane->arena_bytes + size > lane->arena_bytes || place + size > lane->arena_until) return 0;
    char *base = lane->map.buf, *record = base + lane->arena_at + place % lane->arena_bytes;
    volatile uint64_t *slot = (volatile uint64_t *)(base + lane->slots_at + entry % lane->slots * SLOT_BYTES);
    char *row = lane->row_bytes ? base + lane->rows_at + entry % lane->slots * lane->row_bytes : NULL;
    uint32_t weights, told = (uint32_t)(entry + 1);
    slot[0] = 0;
    atomic_thread_fence(memory_order_release);
    char *draft = draft_of(lane, size);
    if (!draft || take_in_all(lane, row, &weights) < 0 || encode(lane, draft, weights) < 0) return -1;
    if (send(lane, record, size, &told) < 0) return -1;
    slot[1] = place, slot[2] = size, slot[3] = told;
    await_stores();
    slot[0] = entry + 1;
    lane->arena_head = place + size;
    return 1;
}

static int noted(Lane *lane) {
    if (!lane->sketch || lane->sketch == Py_None) return 0;
    PyObject *ids = list_of_ids(lane, NULL);
    int failed = !ids || called(PyObject_CallOneArg(lane->note, ids)) < 0;
    Py_XDECREF(ids);
    return failed ? -1 : 0;
}

/* The end of a stretch: Python looks after what is due, and arms the lane again, or leaves it. */
static int go_on(Lane *lane) {
    if (lane->entry < lane->stop) return 0;
    return settle(lane) < 0 ? -1 : called(PyObject_CallNoArgs(lane->onward));
}

static int committed(Lane *lane) {
    if (lane->stage != PREPARED || lane->entry >= lane->stop) return 0;
    int taken = same_places(lane);
    if (taken == 1) taken = publish(lane);
    if (taken != 1) return taken;
    taken = noted(lane);
    forget_step(lane);
    lane->entry++;
    lane->stage = READY;
    return taken < 0 || go_on(lane) < 0 ? -1 : 1;
}

/* ---- hooks ---- */

static int is_timed(Lane *lane) { return lane->watched % lane->time_every == 0; }

static double thread_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void next_step(Lane *lane) {
    lane->looked += is_timed(lane);
    lane->watched++;
    lane->counted++;
}

typedef enum { FORWARD_HOOK, BACKWARD_HOOK, BEFORE_HOOK, AFTER_HOOK, CLEARING_HOOK, DRAW } Kind;

static int take(Lane *lane, Kind kind, PyObject *args) {
    switch (kind) {
    case FORWARD_HOOK: return forwarded(lane, PyTuple_GET_ITEM(args, 1), PyTuple_GET_ITEM(args, 2));
    case BACKWARD_HOOK: return PyTuple_GET_SIZE(args) ? gone_back(lane, PyTuple_GET_ITEM(args, 0)) : 0;
    case BEFORE_HOOK: return prepared(lane, PyTuple_GET_ITEM(args, 1), PyTuple_GET_ITEM(args, 2));
    case AFTER_HOOK: return committed(lane);
    case DRAW: return lane->stage == READY ? drawn(lane, PyTuple_GET_ITEM(args, 0), PyTuple_GET_ITEM(args, 1), PyTuple_GET_ITEM(args, 2), PyTuple_GET_ITEM(args, 3)) : 0;
    default: return 0;
    }
}

/* Takes an event, or leaves the straight way. */
static int timed_take(Lane *lane, Kind kind, PyObject *args) {
    if (lane->stage == OFF) return 0;
    int timed = is_timed(lane);
    double began = timed ? thread_seconds() : 0;
    int taken = take(lane, kind, args);
    if (!taken && leave(lane) < 0) taken = -1;
    if (taken == 1 && kind == AFTER_HOOK) next_step(lane);
    if (timed) lane->seconds += thread_seconds() - began;
    /* Where it was left, nobody else tells Python of this. */
    return taken >= 0 && lane->stage == OFF && settle(lane) < 0 ? -1 : taken;
}

static PyTypeObject LaneType;

static int held_take(Lane *lane, Kind kind, PyObject *args) {
    hold(lane);
    int taken = timed_take(lane, kind, args);
    release(lane);
    return taken;
}

typedef struct {
    PyObject_HEAD
    Lane *lane;
    int kind;
    PyObject *otherwise, *original, *dict;
} Hook;

/* An event of another model or optimizer is none of the lane's business. */
static int is_ours(Hook *self, PyObject *args) {
    Py_ssize_t count = PyTuple_GET_SIZE(args);
    if (self->kind == BACKWARD_HOOK) return 1;
    PyObject *of = self->kind == FORWARD_HOOK ? self->lane->model : self->lane->optimizer;
    return count == 3 && PyTuple_GET_ITEM(args, 0) == of;
}

static int hook_take(Hook *self, PyObject *args) {
    Lane *lane = self->lane;
    if (lane->stage == OFF) return 0;
    if (self->kind != CLEARING_HOOK) return is_ours(self, args) ? held_take(lane, self->kind, args) : 0;
    PyObject *of = PyTuple_GET_SIZE(args) ? PyTuple_GET_ITEM(args, 0) : NULL;
    if (of == lane->model || of == lane->optimizer) lane->cleared = 1;
    return 1;
}

static PyObject *hook_call(Hook *self, PyObject *args, PyObject *kwargs) {
    int taken = hook_take(self, args);
    if (taken < 0) return NULL;
    if (!taken) return PyObject_Call(self->otherwise, args, kwargs);
    if (self->original == Py_None) Py_RETURN_NONE;
    return PyObject_Call(self->original, args, kwargs);
}

static int hook_init(Hook *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"lane", "kind", "otherwise", "original", NULL};
    PyObject *lane, *otherwise, *original = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!iO|O", names, &LaneType, &lane, &self->kind, &otherwise, &original))
        return -1;
    Py_XSETREF(self->lane, (Lane *)Py_NewRef(lane));
    Py_XSETREF(self->otherwise, Py_NewRef(otherwise));
    Py_XSETREF(self->original, Py_NewRef(original));
    return 0;
}

static int hook_traverse(Hook *self, visitproc visit, void *arg) {
    Py_VISIT(self->lane);
    Py_VISIT(self->otherwise);
    Py_VISIT(self->original);
    Py_VISIT(self->dict);
    return 0;
}

static int hook_clear(Hook *self) {
    Py_CLEAR(self->lane);
    Py_CLEAR(self->otherwise);
    Py_CLEAR(self->original);
    Py_CLEAR(self->dict);
    return 0;
}

static void hook_dealloc(Hook *self) {
    PyObject_GC_UnTrack(self);
    hook_clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyGetSetDef properties[] = {{"__dict__", PyObject_GenericGetDict, PyObject_GenericSetDict}, {NULL}};

static PyTypeObject HookType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "trajrec.lane.Hook",
    .tp_doc = "Hook(lane, kind, otherwise, original=None): an event of the lane, or `otherwise` called with the same arguments.",
    .tp_basicsize = sizeof(Hook),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)hook_init,
    .tp_dealloc = (destructor)hook_dealloc,
    .tp_traverse = (traverseproc)hook_traverse,
    .tp_clear = (inquiry)hook_clear,
    .tp_call = (ternaryfunc)hook_call,
    .tp_dictoffset = offsetof(Hook, dict),
    .tp_getset = properties,
};

/* ---- batches ---- */

typedef struct {
    PyObject_HEAD
    Lane *lane;
    PyObject *iterator, *loader, *drawn, *serial;
} Draws;

/* The ids of the batch that the iterator has just handed out; None where they are not known. */
static PyObject *next_ids(Draws *self) {
    Py_ssize_t left = self->drawn == Py_None ? 0 : PyObject_Size(self->drawn);
    if (left < 0) return NULL;
    return left ? PyObject_CallMethodNoArgs(self->drawn, s_popleft) : Py_NewRef(Py_None);
}

static int draw(Draws *self, PyObject *ids, PyObject *content) {
    if (self->lane->stage != OFF) {
        PyObject *args = PyTuple_Pack(4, self->loader, ids, content, self->serial);
        int taken = args ? held_take(self->lane, DRAW, args) : -1;
        Py_XDECREF(args);
        if (taken) return taken;
    }
    return called(PyObject_CallMethodObjArgs((PyObject *)self, s_receive, ids, content, NULL));
}

static PyObject *draws_next(Draws *self) {
    if (!self->iterator) return PyErr_Format(PyExc_TypeError, "this is a copy of a loader's iterator: it cannot go on");
    PyObject *content = PyIter_Next(self->iterator);
    if (!content) return NULL;
    PyObject *ids = next_ids(self);
    int failed = !ids || draw(self, ids, content) < 0;
    Py_XDECREF(ids);
    if (failed) Py_CLEAR(content);
    return content;
}

static int draws_init(Draws *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"lane", "iterator", "loader", "drawn", "serial", NULL};
    PyObject *lane, *iterator, *loader, *drawn, *serial;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!OOOO", names, &LaneType, &lane, &iterator, &loader, &drawn, &serial))
        return -1;
    if (!PyIter_Check(iterator)) {
        PyErr_SetString(PyExc_TypeError, "the lane follows an iterator");
        return -1;
    }
    Py_XSETREF(self->lane, (Lane *)Py_NewRef(lane));
    Py_XSETREF(self->iterator, Py_NewRef(iterator));
    Py_XSETREF(self->loader, Py_NewRef(loader));
    Py_XSETREF(self->drawn, Py_NewRef(drawn));
    Py_XSETREF(self->serial, Py_NewRef(serial));
    return 0;
}

static int draws_traverse(Draws *self, visitproc visit, void *arg) {
    Py_VISIT(self->lane);
    Py_VISIT(self->iterator);
    Py_VISIT(self->loader);
    Py_VISIT(self->drawn);
    return 0;
}

static int draws_clear(Draws *self) {
    Py_CLEAR(self->lane);
    Py_CLEAR(self->iterator);
    Py_CLEAR(self->loader);
    Py_CLEAR(self->drawn);
    Py_CLEAR(self->serial);
    return 0;
}

static void draws_dealloc(Draws *self) {
    PyObject_GC_UnTrack(self);
    draws_clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyTypeObject DrawsType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "trajrec.lane.Draws",
    .tp_doc = "Draws(lane, iterator, loader, drawn, serial): an iterator whose batches the lane hears of, or `receive(ids, content)`.",
    .tp_basicsize = sizeof(Draws),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)draws_init,
    .tp_dealloc = (destructor)draws_dealloc,
    .tp_traverse = (traverseproc)draws_traverse,
    .tp_clear = (inquiry)draws_clear,
    .tp_iter = PyObject_SelfIter,
    .tp_iternext = (iternextfunc)draws_next,
};

/* ---- the lane itself ---- */

#define OBJECTS(DO)                                                                                                        \
    DO(model) DO(optimizer) DO(loader) DO(serial) DO(modules) DO(modes) DO(optimized) DO(grads) DO(values) DO(views)        \
    DO(pointers) DO(keys) DO(options) DO(sizes) DO(hyper) DO(get_state) DO(is_grad_enabled) DO(crc32) DO(tensor)            \
    DO(float32) DO(look) DO(note) DO(summed) DO(renew) DO(onward) DO(left) DO(settled)

static int lane_traverse(Lane *lane, visitproc visit, void *arg) {
#define VISIT(name) Py_VISIT(lane->name);
    OBJECTS(VISIT)
    Py_VISIT(lane->content);
    Py_VISIT(lane->inputs);
    Py_VISIT(lane->before);
    return 0;
}

static int lane_clear(Lane *lane) {
#define CLEAR(name) Py_CLEAR(lane->name);
    OBJECTS(CLEAR)
    forget_step(lane);
    if (lane->map.obj) PyBuffer_Release(&lane->map);
    lane->stage = OFF;
    return 0;
}

static void lane_dealloc(Lane *lane) {
    PyObject_GC_UnTrack(lane);
    lane_clear(lane);
    PyMem_Free(lane->draft);
    PyMem_Free(lane->ids);
    PyMem_Free(lane->weights);
    Py_TYPE(lane)->tp_free((PyObject *)lane);
}

static PyObject *lane_leave(Lane *lane, PyObject *unused) {
    hold(lane);
    int failed = leave(lane) < 0;
    release(lane);
    if (failed) return NULL;
    Py_RETURN_NONE;
}

static PyObject *lane_settle(Lane *lane, PyObject *unused) {
    hold(lane);
    int failed = settle(lane) < 0;
    release(lane);
    if (failed) return NULL;
    Py_RETURN_NONE;
}

/* Asked once for many steps: an array stays where it is, and that the parameters do is looked at in every step. */
static int find_weights(Lane *lane) {
    Py_ssize_t count = PyTuple_GET_SIZE(lane->views);
    Memory *weights = PyMem_Realloc(lane->weights, (count ? count : 1) * sizeof *weights);
    if (!weights) return PyErr_NoMemory(), -1;
    lane->weights = weights;
    for (Py_ssize_t k = 0; k < count; k++) {
        Py_buffer view;
        if (PyObject_GetBuffer(PyTuple_GET_ITEM(lane->views, k), &view, PyBUF_SIMPLE) < 0) return -1;
        weights[k] = (Memory){view.buf, view.len};
        PyBuffer_Release(&view);
    }
    return 0;
}

/* All fields by name, those that are not given stay; then READY for step `entry`. */
static PyObject *lane_arm(Lane *lane, PyObject *args, PyObject *kwargs) {
    PyObject *key, *value;
    Py_ssize_t at = 0;
    while (kwargs && PyDict_Next(kwargs, &at, &key, &value))
        if (PyObject_SetAttr((PyObject *)lane, key, value) < 0) return NULL;
#define CHECK(name)                                                                                                        \
    if (!lane->name) return PyErr_Format(PyExc_TypeError, "the lane has no %s", #name);
    OBJECTS(CHECK)
    if (lane->time_every < 1 || lane->slots < 1 || lane->arena_bytes < 1) return PyErr_Format(PyExc_ValueError, "the lane has no ring");
    if (find_weights(lane) < 0) return NULL;
    lane->stage = READY;
    Py_RETURN_NONE;
}

static PyObject *lane_attach(Lane *lane, PyObject *map) {
    if (lane->map.obj) PyBuffer_Release(&lane->map);
    if (PyObject_GetBuffer(map, &lane->map, PyBUF_WRITABLE) < 0) return NULL;
    Py_RETURN_NONE;
}

static PyObject *lane_detach(Lane *lane, PyObject *unused) {
    lane_clear(lane);
    Py_RETURN_NONE;
}

#define MEMBER(name) {#name, T_OBJECT, offsetof(Lane, name), 0, NULL},
#define SEEN(name) {#name, T_OBJECT, offsetof(Lane, name), READONLY, NULL},
#define NUMBER(name) {#name, T_LONGLONG, offsetof(Lane, name), 0, NULL},
static PyMemberDef lane_members[] = {
    OBJECTS(MEMBER) SEEN(content) SEEN(inputs) SEEN(before) SEEN(sketch) SEEN(loss) SEEN(rng)
    NUMBER(entry) NUMBER(before_us) NUMBER(stop) NUMBER(epoch) NUMBER(groups) NUMBER(names) NUMBER(look_every) NUMBER(state_bytes)
    NUMBER(slots) NUMBER(slots_at) NUMBER(arena_at) NUMBER(arena_bytes) NUMBER(arena_head) NUMBER(arena_until)
    NUMBER(rows_at) NUMBER(row_bytes) NUMBER(time_every) NUMBER(watched) NUMBER(counted) NUMBER(looked)
    {"seconds", T_DOUBLE, offsetof(Lane, seconds), READONLY, NULL}, {"cleared", T_INT, offsetof(Lane, cleared), 0, NULL},
    {"stage", T_INT, offsetof(Lane, stage), READONLY, NULL}, {NULL}};

static PyGetSetDef lane_properties[] = {{"ids", (getter)list_of_ids, NULL, NULL, NULL}, {NULL}};

static PyMethodDef lane_methods[] = {
    {"leave", (PyCFunction)lane_leave, METH_NOARGS, "Leaves the straight way; Python takes over what was seen."},
    {"settle", (PyCFunction)lane_settle, METH_NOARGS, "Has Python's counts made right."},
    {"arm", (PyCFunction)(void (*)(void))lane_arm, METH_VARARGS | METH_KEYWORDS, "Sets fields and waits for a batch."},
    {"attach", (PyCFunction)lane_attach, METH_O, "Holds a ring's map."},
    {"detach", (PyCFunction)lane_detach, METH_NOARGS, "Lets go of everything."},
    {NULL}};

static PyTypeObject LaneType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "trajrec.lane.Lane",
    .tp_doc = "The straight way of a step; see trajrec.straight.",
    .tp_basicsize = sizeof(Lane),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = PyType_GenericNew,
    .tp_dealloc = (destructor)lane_dealloc,
    .tp_traverse = (traverseproc)lane_traverse,
    .tp_clear = (inquiry)lane_clear,
    .tp_methods = lane_methods,
    .tp_members = lane_members,
    .tp_getset = lane_properties,
};

static PyObject *copy_crc32(PyObject *module, PyObject *args) {
    Py_buffer to, from;
    unsigned int crc = 0;
    if (!PyArg_ParseTuple(args, "w*y*|I:copy_crc32", &to, &from, &crc)) return NULL;
    int fits = to.len == from.len;
    if (fits) {
        PyThreadState *released = from.len > LONG_COPY ? PyEval_SaveThread() : NULL;
        crc = copy_folding(to.buf, from.buf, (size_t)from.len, crc);
        await_stores();
        if (released) PyEval_RestoreThread(released);
    } else PyErr_Format(PyExc_ValueError, "%zd bytes do not fit a place of %zd", from.len, to.len);
    PyBuffer_Release(&to);
    PyBuffer_Release(&from);
    return fits ? PyLong_FromUnsignedLong(crc) : NULL;
}

/* Only where the processor can. */
static PyMethodDef copying[] = {{"copy_crc32", copy_crc32, METH_VARARGS, "Copies bytes; the CRC-32 of the copy."}, {NULL}};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "trajrec.lane", "The straight way of a step.", -1, NULL};

static int intern(void) {
#define INTERN(name, text)                                                                                                 \
    if (!(name = PyUnicode_InternFromString(text))) return -1;
    INTERN(s_training, "training")
    INTERN(s_grad, "grad")
    INTERN(s_requires_grad, "requires_grad")
    INTERN(s_data_ptr, "data_ptr")
    INTERN(s_item, "item")
    INTERN(s_dtype, "dtype")
    INTERN(s_is_cpu, "is_cpu")
    INTERN(s_ndim, "ndim")
    INTERN(s_is_neg, "is_neg")
    INTERN(s_params, "params")
    INTERN(s_param_groups, "param_groups")
    INTERN(s_popleft, "popleft")
    INTERN(s_receive, "receive")
    return 0;
}

PyMODINIT_FUNC PyInit_lane(void) {
    if (intern() < 0 || PyType_Ready(&LaneType) < 0 || PyType_Ready(&HookType) < 0 || PyType_Ready(&DrawsType) < 0) return NULL;
    PyObject *module = PyModule_Create(&definition);
    if (!module) return NULL;
    if (PyModule_AddObjectRef(module, "Lane", (PyObject *)&LaneType) < 0) return NULL;
    if (PyModule_AddObjectRef(module, "Hook", (PyObject *)&HookType) < 0) return NULL;
    if (PyModule_AddObjectRef(module, "Draws", (PyObject *)&DrawsType) < 0) return NULL;
    if (can_fold() && PyModule_AddFunctions(module, copying) < 0) return NULL;
    return module;
}
