package registry

import (
	"fmt"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
)

// A member is one for tests. It is kept while its flag is set.
type member struct {
	life    Life
	name    string
	kept    atomic.Bool
	refuses atomic.Bool // Forget, although Forgettable says yes
	looks   *atomic.Int64
	gone    atomic.Bool
}

func (m *member) Life() *Life  { return &m.life }
func (m *member) Name() string { return m.name }
func (m *member) Forgettable() bool {
	m.looks.Add(1)
	return !m.kept.Load()
}

func (m *member) Forget() bool {
	if m.refuses.Load() {
		return false
	}
	m.gone.Store(true)
	return true
}

// A fixture is a registry and the looks at its members.
type fixture struct {
	Registry[member, *member]
	looks atomic.Int64
}

func (f *fixture) make(name string) *member { return &member{name: name, looks: &f.looks} }

func (f *fixture) add(name string) (*member, []*member) {
	m, _, forgotten := f.Add(name, false, f.make)
	return m, forgotten
}

func (f *fixture) fill(n int) (all []*member) {
	for i := range n {
		m, _ := f.add(fmt.Sprint("m", i))
		all = append(all, m)
	}
	return all
}

func (f *fixture) size() (n int) {
	for range f.All {
		n++
	}
	return n
}

func names(members []*member) (all []string) {
	for _, m := range members {
		all = append(all, m.name)
	}
	return all
}

func TestAdd(t *testing.T) {
	f := &fixture{}
	require.Nil(t, f.Get("a"))
	a, isNew, forgotten := f.Add("a", false, f.make)
	require.True(t, isNew)
	require.Empty(t, forgotten)
	again, isNew, _ := f.Add("a", true, func(string) *member { panic("it is there") })
	require.False(t, isNew)
	require.True(t, a == again && a == f.Get("a") && f.Has(a))
	require.False(t, f.Has(f.make("a")), "another one of the same name")
	require.False(t, f.Has(f.make("b")))
	require.True(t, f.Keep("a", func(m *member) { require.True(t, m == a) }))
	require.False(t, f.Keep("b", func(*member) { t.Error("there is none") }))
	for range f.All {
		break
	}
}

// A name may be a part of something long that must not be kept alive by it.
func TestNamesAreCloned(t *testing.T) {
	f := &fixture{}
	name := strings.Repeat("x", 64<<10)
	var got string
	f.Add(name, false, func(name string) *member { got = name; return f.make(name) })
	require.Equal(t, name, got)
	require.NotEqual(t, reflect.ValueOf(name).Pointer(), reflect.ValueOf(got).Pointer())
}

func TestBound(t *testing.T) {
	f := &fixture{}
	var pinned []*member
	for i := range 10 {
		m, _, _ := f.Add(fmt.Sprint("pinned", i), true, f.make)
		pinned = append(pinned, m)
	}
	gone := 0
	for i := range 2 * Max {
		_, forgotten := f.add(fmt.Sprint("m", i))
		gone += len(forgotten)
		for _, m := range forgotten {
			require.True(t, m.gone.Load())
			require.Nil(t, f.Get(m.name))
			require.False(t, m.life.Begin(), "nobody may begin to use it")
		}
	}
	require.Equal(t, Max, gone)
	require.Equal(t, Max+len(pinned), f.size())
	for _, m := range pinned {
		require.True(t, f.Has(m))
	}
}

func TestLongestIdleIsForgottenFirst(t *testing.T) {
	f := &fixture{}
	all := f.fill(Max)
	for _, m := range all[:5] { // used again
		f.Touch(&m.life)
	}
	f.Touch(&all[6].life)
	var got []string
	for i := range 4 {
		_, forgotten := f.add(fmt.Sprint("new", i))
		got = append(got, names(forgotten)...)
	}
	require.Equal(t, []string{"m5", "m7", "m8", "m9"}, got)
}

func TestBusyAndKeptOnesStay(t *testing.T) {
	f := &fixture{}
	all := f.fill(Max)
	require.True(t, all[0].life.Begin())
	all[1].kept.Store(true)
	_, forgotten := f.add("new1")
	require.Equal(t, []string{"m2"}, names(forgotten))
	require.True(t, f.Has(all[0]))
	require.True(t, f.Has(all[1]))
	all[0].life.End()
	all[1].kept.Store(false)
	for i := range Max - 3 { // m3 to the last one
		f.add(fmt.Sprint("other", i))
	}
	require.True(t, f.Has(all[0]), "it was in use when the others were idle already")
	f.add("and")
	f.add("another")
	f.add("one")
	require.False(t, f.Has(all[0]))
	require.False(t, f.Has(all[1]))
}

// A member that refuses is usable all the same, and others come and go.
func TestRefusing(t *testing.T) {
	f := &fixture{}
	all := f.fill(Max)
	all[0].refuses.Store(true)
	_, forgotten := f.add("new")
	require.Empty(t, forgotten)
	require.True(t, all[0].life.Begin())
	require.True(t, all[0].life.InUse())
	all[0].life.End()
	require.False(t, all[0].life.InUse())
	all[0].refuses.Store(false)
	_, forgotten = f.add("newer")
	require.Equal(t, []string{"m0", "m1"}, names(forgotten), "back to the bound")
}

// However many members cannot go, an addition looks at a few only, and the
// registry shrinks once they can.
func TestCrowdCostsFewLooks(t *testing.T) {
	for name, keep := range map[string]func(*member){
		"busy": func(m *member) { m.life.Begin() },
		"kept": func(m *member) { m.kept.Store(true) },
	} {
		t.Run(name, func(t *testing.T) {
			f := &fixture{}
			var all []*member
			for i := range Max + 500 {
				before := f.looks.Load()
				m, forgotten := f.add(fmt.Sprint("m", i))
				keep(m)
				all = append(all, m)
				require.Empty(t, forgotten)
				require.LessOrEqual(t, f.looks.Load()-before, int64(looks))
			}
			for _, m := range all {
				if !m.kept.Swap(false) {
					m.life.End()
				}
			}
			for i := range 100 {
				before := f.looks.Load()
				f.add(fmt.Sprint("later", i))
				require.LessOrEqual(t, f.looks.Load()-before, int64(looks))
			}
			require.Equal(t, Max, f.size())
		})
	}
}

func TestLife(t *testing.T) {
	var l Life
	require.False(t, l.InUse())
	require.True(t, l.Begin())
	require.True(t, l.Begin())
	l.End()
	require.True(t, l.InUse())
	require.False(t, l.close())
	l.End()
	require.False(t, l.InUse())
	require.True(t, l.close())
	require.False(t, l.Begin())
	l.reopen()
	require.False(t, l.InUse(), "what was tried in vain has not begun")
	require.True(t, l.Begin())
}

// use finds or makes the member of that name and begins to use it.
func (f *fixture) use(name string) *member {
	for {
		m := f.Get(name)
		if m == nil {
			m, _ = f.add(name)
		}
		if m.life.Begin() {
			f.Touch(&m.life)
			return m
		}
	}
}

// Uses begin beside others being forgotten. While one lasts, its member is the
// one of its name; when all are over, nobody is in use.
func TestBeginBesideForgetting(t *testing.T) {
	f := &fixture{}
	f.fill(Max)
	var all sync.WaitGroup
	for g := range 8 {
		all.Go(func() {
			for i := range 3000 {
				name := fmt.Sprint("hot", i%7)
				if i%3 == 0 {
					name = fmt.Sprint("cold", g, "-", i)
				}
				m := f.use(name)
				if m.name != name || m.gone.Load() || !f.Has(m) || !m.life.InUse() {
					t.Errorf("%s was forgotten in use", name)
				}
				m.life.End()
			}
		})
	}
	var held []*member
	for i := range 300 {
		held = append(held, f.use(fmt.Sprint("held", i)))
	}
	all.Wait()
	for _, m := range held {
		require.True(t, f.Get(m.name) == m && m.life.InUse(), m.name)
		m.life.End()
	}
	require.LessOrEqual(t, f.size(), Max+8*looks)
	for m := range f.All {
		require.False(t, m.life.InUse(), m.name)
		require.True(t, f.Has(m))
		require.False(t, m.gone.Load())
	}
}

// The worst case of the above: everybody wants what is just being forgotten.
func TestBeginBesideClose(t *testing.T) {
	for range 2000 {
		var l Life
		var begun atomic.Int64
		var closed bool
		var all sync.WaitGroup
		for range 2 {
			all.Go(func() {
				if l.Begin() {
					begun.Add(1)
				}
			})
		}
		all.Go(func() { closed = l.close() })
		all.Wait()
		require.Equal(t, closed, begun.Load() == 0)
		require.Equal(t, !closed, l.InUse() && begun.Load() == 2)
	}
}
