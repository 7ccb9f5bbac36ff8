"""What the CPU's attention kernels are made of: register-blocked products of small matrices, and sums over vectors."""

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from lockstep.kernels._cpu import inline_njit
from lockstep.kernels.memory.kv_cache import CPU_VECTOR

_VECTOR = ir.VectorType(ir.FloatType(), CPU_VECTOR)


@intrinsic
def pointer(typingctx, array):
    """The address of the array's first element. Unlike an array it is not counted by reference at every call, which
    costs more than the work on a short context; the caller keeps the array alive.
    """

    def codegen(context, builder, signature, args):
        return context.make_array(signature.args[0])(context, builder, value=args[0]).data

    return types.CPointer(array.dtype)(array), codegen


@intrinsic
def prefetch(typingctx, pointer, index):
    """Ask for the cache line of pointer[index]."""

    def codegen(context, builder, signature, args):
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        function_type = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        prefetch = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0i8")
        address = builder.bitcast(builder.gep(args[0], [args[1]]), byte)
        builder.call(prefetch, [address, word(0), word(3), word(1)])
        return context.get_dummy_value()

    return types.void(pointer, types.intp), codegen


@intrinsic
def at(typingctx, pointer, index):
    """pointer + index."""

    def codegen(context, builder, signature, args):
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, types.intp), codegen


def _fma_chain(num_rows, num_vectors, accumulate):
    """For r < num_rows and v < num_vectors, `sums` being (acc, acc_stride, acc_offsets) and so on:

    acc[r * acc_stride + acc_offsets[first + v] :][:16] = (itself if accumulate else 0) + sum over i < n, ascending, of
    coefficients[r * coefficient_stride + i] * memory[memory_offsets[first + v] + i * memory_stride :][:16].

    The sums stay in registers: many independent chains hide the latency of a multiply-add, and what is loaded serves
    all rows or all vectors. Sums are stored in the order of v: of two that overlap in memory the later one stays.
    """

    @intrinsic
    def chain(typingctx, sums, factors, source, first, n):
        signature = types.void(sums, factors, source, types.intp, types.intp)

        def codegen(context, builder, signature, args):
            (acc, acc_stride, acc_offsets), (coefficients, coefficient_stride), (memory, memory_stride, offsets) = (
                cgutils.unpack_tuple(builder, arg) for arg in args[:3]
            )
            first, n = args[3:]
            word, lane, vector_pointer = n.type, ir.IntType(32), _VECTOR.as_pointer()
            fma_type = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
            fma = cgutils.get_or_insert_function(builder.module, fma_type, f"llvm.fma.v{CPU_VECTOR}f32")
            undefined = ir.Constant(_VECTOR, ir.Undefined)
            first_lane = ir.Constant(ir.VectorType(lane, CPU_VECTOR), [0] * CPU_VECTOR)
            zero = ir.Constant(_VECTOR, [0.0] * CPU_VECTOR)

            def at(base, step, stride):
                return builder.gep(base, [builder.mul(step, stride)])

            def vectors_of(base, offsets):
                indices = [builder.add(first, word(v)) for v in range(num_vectors)]
                return [builder.gep(base, [builder.load(builder.gep(offsets, [index]))]) for index in indices]

            rows = [word(r) for r in range(num_rows)]
            targets = [
                builder.bitcast(at(target, r, acc_stride), vector_pointer)
                for target in vectors_of(acc, acc_offsets)
                for r in rows
            ]
            sources = vectors_of(memory, offsets)
            starts = [builder.load(target, align=4) if accumulate else zero for target in targets]
            totals = [cgutils.alloca_once_value(builder, start) for start in starts]
            with cgutils.for_range(builder, n) as loop:
                splats = []
                for r in rows:
                    factor = builder.load(builder.gep(at(coefficients, r, coefficient_stride), [loop.index]))
                    splat = builder.insert_element(undefined, factor, lane(0))
                    splats.append(builder.shuffle_vector(splat, undefined, first_lane))
                for v, source in enumerate(sources):
                    values = builder.bitcast(at(source, loop.index, memory_stride), vector_pointer)
                    values = builder.load(values, align=4)
                    for splat, total in zip(splats, totals[v * num_rows : (v + 1) * num_rows], strict=True):
                        builder.store(builder.call(fma, [splat, values, builder.load(total)]), total)
            for target, total in zip(targets, totals, strict=True):
                builder.store(builder.load(total), target, align=4)
            return context.get_dummy_value()

        return signature, codegen

    return chain


def _reduction(start, combine):
    """array[: 16 * n] to one float: lane by lane over the n vectors, then the lanes as a tree (8, 4, 2, 1)."""

    @intrinsic
    def reduction(typingctx, array, n):
        signature = types.float32(array, types.intp)

        def codegen(context, builder, signature, args):
            array, n = args
            lane = ir.IntType(32)
            array = builder.bitcast(array, _VECTOR.as_pointer())
            result = cgutils.alloca_once_value(builder, ir.Constant(_VECTOR, [start] * CPU_VECTOR))
            with cgutils.for_range(builder, n) as loop:
                values = builder.load(builder.gep(array, [loop.index]), align=4)
                builder.store(combine(builder, values, builder.load(result)), result)
            lanes = builder.load(result)
            for half in (8, 4, 2, 1):
                order = ir.Constant(
                    ir.VectorType(lane, CPU_VECTOR), [(i + half) % CPU_VECTOR for i in range(CPU_VECTOR)]
                )
                lanes = combine(builder, builder.shuffle_vector(lanes, lanes, order), lanes)
            return builder.extract_element(lanes, lane(0))

        return signature, codegen

    return reduction


vector_sum = _reduction(0.0, lambda builder, x, y: builder.fadd(x, y))
vector_max = _reduction(float("-inf"), lambda builder, x, y: builder.select(builder.fcmp_ordered(">", x, y), x, y))


def fma_rows(num_vectors, accumulate):
    """`_fma_chain` for any number of rows."""
    one, two, four = (_fma_chain(num_rows, num_vectors, accumulate) for num_rows in (1, 2, 4))

    @inline_njit
    def rows(num_rows, sums, factors, source, first, n):
        acc, acc_stride, acc_offsets = sums
        coefficients, coefficient_stride = factors
        row = 0
        while row < num_rows:
            sums = (at(acc, row * acc_stride), acc_stride, acc_offsets)
            factors = (at(coefficients, row * coefficient_stride), coefficient_stride)
            if num_rows - row >= 4:
                four(sums, factors, source, first, n)
                row += 4
            elif num_rows - row >= 2:
                two(sums, factors, source, first, n)
                row += 2
            else:
                one(sums, factors, source, first, n)
                row += 1

    return rows


_add_one, _add_two = (fma_rows(num_vectors, accumulate=True) for num_vectors in (1, 2))


@inline_njit
def add_products(num_rows, sums, factors, source, num_vectors, n):
    first = 0
    while num_vectors - first >= 2:
        _add_two(num_rows, sums, factors, source, first, n)
        first += 2
    if first < num_vectors:
        _add_one(num_rows, sums, factors, source, first, n)


@inline_njit
def fill(array, begin, end, value):
    for i in range(begin, end):
        array[i] = value


@inline_njit
def copy(source, target, size):
    for i in range(size):
        target[i] = source[i]
