package registry

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestTableAgainstMap(t *testing.T) {
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 0))
		table, want := Table[int]{}, map[string]*int{}
		names := 1 + r.IntN(300)
		for range 5000 {
			name := ""
			if n := r.IntN(names); n > 0 {
				name = fmt.Sprint("service-", n)
			}
			require.True(t, want[name] == table.Get(name), name)
			switch {
			case want[name] == nil && r.IntN(3) > 0:
				want[name] = new(int)
				table.Put(name, want[name])
			case r.IntN(4) == 0:
				table.Remove(name, new(int)) // another's value: nothing happens
			case r.IntN(2) == 0:
				table.Remove(name, want[name])
				delete(want, name)
			}
		}
		requireSame(t, want, &table)
	}
}

func requireSame(t *testing.T, want map[string]*int, table *Table[int]) {
	t.Helper()
	for name, v := range want {
		require.True(t, v == table.Get(name), name)
	}
	values := map[*int]bool{}
	for v := range table.All() {
		require.False(t, values[v], "yielded twice")
		values[v] = true
	}
	require.Len(t, values, len(want))
	for _, v := range want {
		require.True(t, values[v])
	}
	for range table.All() {
		break // early
	}
}

func TestEmptyTable(t *testing.T) {
	var table Table[int]
	require.Nil(t, table.Get("a"))
	table.Remove("a", new(int))
	for range table.All() {
		t.Error("there is nothing")
	}
}

// Names that come and go do not fill the table.
func TestTableStaysSmall(t *testing.T) {
	var table Table[int]
	v := new(int)
	for i := range 10_000 {
		name := fmt.Sprint(i)
		table.Put(name, v)
		table.Remove(name, v)
		require.Nil(t, table.Get(name))
	}
	require.LessOrEqual(t, len(*table.slots.Load()), 16)
}

func TestTableGetAllocatesNothing(t *testing.T) {
	var table Table[int]
	table.Put("a", new(int))
	require.Zero(t, testing.AllocsPerRun(100, func() { table.Get("a"); table.Get("b") }))
}

// Readers beside a writer: what is there all the time is always found, and
// nothing is found under another's name.
func TestTableReadersBesideWriter(t *testing.T) {
	var table Table[string]
	value := func(name string) *string { return &name }
	for i := range 50 {
		name := fmt.Sprint("stays-", i)
		table.Put(name, value(name))
	}
	var done atomic.Bool
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			for i := 0; !done.Load(); i++ {
				stays, goes := fmt.Sprint("stays-", i%50), fmt.Sprint("goes-", i%500)
				if v := table.Get(stays); v == nil || *v != stays {
					t.Errorf("%s is lost", stays)
					return
				}
				if v := table.Get(goes); v != nil && *v != goes {
					t.Errorf("%s is found as %s", *v, goes)
					return
				}
				if i%100 == 0 {
					countStays(t, &table)
				}
			}
		})
	}
	r := rand.New(rand.NewPCG(1, 1))
	for range 30_000 {
		name := fmt.Sprint("goes-", r.IntN(500))
		if v := table.Get(name); v != nil {
			table.Remove(name, v)
		} else {
			table.Put(name, value(name))
		}
	}
	done.Store(true)
	readers.Wait()
}

func countStays(t *testing.T, table *Table[string]) {
	n := 0
	for v := range table.All() {
		if (*v)[0] == 's' {
			n++
		}
	}
	if n != 50 {
		t.Errorf("All yields %d of 50 that stay", n)
	}
}
